//! What CRIU runs as `tar` for every tmpfs of a container, to put its files into an image or take them from there.
//!
//! GNU tar is three programs, since a shell runs gzip for it, and most of a small container's dump and restore was the start of
//! them, five times, for directories with next to nothing in them. So what is small and plain is done here, by a program that
//! is in memory anyway, and all else by GNU tar. The archives are the same.

use std::{
    env,
    ffi::OsString,
    fs::{self, DirBuilder, File},
    io::{self, Read, Seek as _, Write},
    os::unix::{
        ffi::{OsStrExt as _, OsStringExt as _},
        fs::{
            DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
            lchown,
        },
        process::CommandExt as _,
    },
    path::{Component, Path, PathBuf},
    process::{Command, ExitCode},
};

use flate2::{Compression, read::MultiGzDecoder, write::GzEncoder};
use rustix::fs::{
    AtFlags, CWD, Dev, FileType, Mode, Timespec, Timestamps, major, makedev, minor, mknodat, utimensat,
};
use tar::{Archive, Builder, EntryType, Header};

/// Directory in the guest image that has this program under tar's name.
pub(super) const DIR: &str = "/usr/lib/machinen";
const GNU_TAR: &str = "/usr/bin/tar";

/// CRIU's arguments (criu/filesystems.c).
const CREATE: [&str; 12] = [
    "--create",
    "--gzip",
    "--no-unquote",
    "--no-wildcards",
    "--one-file-system",
    "--check-links",
    "--preserve-permissions",
    "--sparse",
    "--numeric-owner",
    "--directory",
    SOURCE,
    ".",
];
const SOURCE: &str = "/proc/self/fd/0";
/// The directory follows.
const EXTRACT: [&str; 5] = ["--extract", "--gzip", "--no-unquote", "--no-wildcards", "--directory"];

/// What is small: entries, and bytes of an archive that is not compressed.
const MAX_ENTRIES: usize = 256;
const MAX_BYTES: u64 = 512 << 10;
/// Of the headers of all archives; a name may not fill its field.
const MAX_NAME: usize = 99;

/// One file of a tmpfs.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Node {
    /// Below the root, which has an empty one; after that of its directory.
    path: PathBuf,
    kind: Kind,
    mode: u32,
    uid: u32,
    gid: u32,
    /// Seconds since the Unix epoch: more is not in an archive.
    mtime: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    Directory,
    File(Vec<u8>),
    Symlink(PathBuf),
    Character(Dev),
    Block(Dev),
    Fifo,
}

/// Does the work, if this program was started as tar.
pub(crate) fn run_as_tar() -> Option<ExitCode> {
    let mut args = env::args_os();
    let name = args.next()?;
    if Path::new(&name).file_name()? != "tar" {
        return None;
    }
    let args: Vec<_> = args.collect();
    let done = match args.split_last() {
        _ if args == CREATE => create(),
        Some((dir, options)) if options == EXTRACT => extract(Path::new(dir)),
        _ => Ok(false),
    };
    let error = match done {
        Ok(true) => return Some(ExitCode::SUCCESS),
        #[expect(clippy::disallowed_methods, reason = "this process becomes the other program")]
        Ok(false) => Command::new(GNU_TAR).args(args).exec(),
        Err(error) => error,
    };
    // As tar's own; CRIU has its log in the place of this.
    eprintln!("tar: {error}");
    Some(ExitCode::from(2))
}

/// False: nothing was done, it is work for GNU tar.
fn create() -> io::Result<bool> {
    let Some(nodes) = read_tree(Path::new(SOURCE))? else { return Ok(false) };
    let mut output = GzEncoder::new(io::stdout().lock(), Compression::fast());
    write_archive(&nodes, &mut output)?;
    output.finish()?.flush()?;
    Ok(true)
}

/// As for [`create`].
fn extract(dir: &Path) -> io::Result<bool> {
    // What is there already is to be treated as GNU tar would.
    let nodes = if fs::read_dir(dir)?.next().is_none() { read_archive(io::stdin().lock())? } else { None };
    let Some(nodes) = nodes else {
        File::from(rustix::io::dup(io::stdin())?).rewind()?;
        return Ok(false);
    };
    make_tree(&nodes, dir)?;
    Ok(true)
}

/// None: it is large, or has what is not plain.
fn read_tree(root: &Path) -> io::Result<Option<Vec<Node>>> {
    // The link is followed.
    let device = fs::metadata(root)?.dev();
    let (mut nodes, mut bytes): (Vec<Node>, u64) = (Vec::new(), 0);
    let mut pending = vec![PathBuf::new()];
    while let Some(path) = pending.pop() {
        let at = root.join(&path);
        let status =
            if path.as_os_str().is_empty() { fs::metadata(root)? } else { fs::symlink_metadata(&at)? };
        let kind = status.file_type();
        // Has no place in an archive; CRIU makes it.
        if kind.is_socket() {
            continue;
        }
        bytes += 512 + if kind.is_file() { status.len() } else { 0 };
        let linked = !kind.is_dir() && status.nlink() > 1;
        if linked || bytes > MAX_BYTES || nodes.len() == MAX_ENTRIES || status.mtime() < 0 {
            return Ok(None);
        }
        let kind = match kind {
            _ if kind.is_dir() => Kind::Directory,
            _ if kind.is_file() => Kind::File(fs::read(&at)?),
            _ if kind.is_symlink() => Kind::Symlink(fs::read_link(&at)?),
            _ if kind.is_char_device() => Kind::Character(status.rdev()),
            _ if kind.is_block_device() => Kind::Block(status.rdev()),
            _ => Kind::Fifo,
        };
        if matches!(kind, Kind::Directory) && status.dev() == device {
            for entry in fs::read_dir(&at)? {
                pending.push(path.join(entry?.file_name()));
            }
        }
        let (mode, uid, gid) = (status.mode() & 0o7777, status.uid(), status.gid());
        let node = Node { path, kind, mode, uid, gid, mtime: status.mtime().unsigned_abs() };
        if name(&node).len() > MAX_NAME || link(&node).len() > MAX_NAME {
            return Ok(None);
        }
        nodes.push(node);
    }
    Ok(Some(nodes))
}

/// As in archives.
fn name(node: &Node) -> Vec<u8> {
    let mut name = b"./".to_vec();
    name.extend(node.path.as_os_str().as_bytes());
    if matches!(node.kind, Kind::Directory) && name.len() > 2 {
        name.push(b'/');
    }
    name
}

fn link(node: &Node) -> &[u8] {
    if let Kind::Symlink(target) = &node.kind { target.as_os_str().as_bytes() } else { b"" }
}

fn write_archive(nodes: &[Node], output: impl Write) -> io::Result<()> {
    let mut archive = Builder::new(output);
    for node in nodes {
        let mut header = Header::new_gnu();
        let (kind, content, device): (_, &[u8], _) = match &node.kind {
            Kind::Directory => (EntryType::Directory, b"", None),
            Kind::File(content) => (EntryType::Regular, content, None),
            Kind::Symlink(_) => (EntryType::Symlink, b"", None),
            Kind::Character(device) => (EntryType::Char, b"", Some(*device)),
            Kind::Block(device) => (EntryType::Block, b"", Some(*device)),
            Kind::Fifo => (EntryType::Fifo, b"", None),
        };
        let (name, link) = (name(node), link(node));
        header.as_old_mut().name[..name.len()].copy_from_slice(&name);
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link);
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);
        header.set_mode(node.mode);
        header.set_uid(node.uid.into());
        header.set_gid(node.gid.into());
        header.set_mtime(node.mtime);
        if let Some(device) = device {
            header.set_device_major(major(device))?;
            header.set_device_minor(minor(device))?;
        }
        header.set_cksum();
        archive.append(&header, content)?;
    }
    archive.into_inner()?.flush()
}

/// None: it is large, or has what is not plain.
fn read_archive(compressed: impl Read) -> io::Result<Option<Vec<Node>>> {
    let mut bytes = Vec::new();
    // One of another kind than this expects is for GNU tar to judge.
    let read = MultiGzDecoder::new(compressed).take(MAX_BYTES + 1).read_to_end(&mut bytes);
    if read.is_err() || bytes.len() as u64 > MAX_BYTES {
        return Ok(None);
    }
    let (mut nodes, mut archive) = (Vec::new(), Archive::new(bytes.as_slice()));
    for entry in archive.entries()?.raw(true) {
        let mut entry = entry?;
        let header = entry.header().clone();
        let device = || -> io::Result<Dev> {
            Ok(makedev(header.device_major()?.unwrap_or(0), header.device_minor()?.unwrap_or(0)))
        };
        let kind = match header.entry_type() {
            EntryType::Directory => Kind::Directory,
            EntryType::Regular => {
                let mut content = Vec::new();
                entry.read_to_end(&mut content)?;
                Kind::File(content)
            }
            EntryType::Symlink => {
                let target = entry.link_name_bytes().unwrap_or_default().into_owned();
                Kind::Symlink(OsString::from_vec(target).into())
            }
            EntryType::Char => Kind::Character(device()?),
            EntryType::Block => Kind::Block(device()?),
            EntryType::Fifo => Kind::Fifo,
            _ => return Ok(None),
        };
        let named = PathBuf::from(OsString::from_vec(entry.path_bytes().into_owned()));
        let path: PathBuf = named.components().filter(|part| *part != Component::CurDir).collect();
        let number = |value: u64| u32::try_from(value).map_err(|_| io::ErrorKind::InvalidData);
        let (uid, gid) = (number(header.uid()?)?, number(header.gid()?)?);
        let node = Node { path, kind, mode: header.mode()? & 0o7777, uid, gid, mtime: header.mtime()? };
        if nodes.len() == MAX_ENTRIES || !is_below(&node, &nodes) {
            return Ok(None);
        }
        nodes.push(node);
    }
    Ok(Some(nodes))
}

/// Whether its directory was made before, and it was not, so that no link leads elsewhere. The root is first.
fn is_below(node: &Node, before: &[Node]) -> bool {
    let plain = node.path.components().all(|part| matches!(part, Component::Normal(_)));
    let is_new = before.iter().all(|other| other.path != node.path);
    let in_directory = match node.path.parent() {
        None => before.is_empty() && node.kind == Kind::Directory,
        Some(parent) => before.iter().any(|other| other.path == parent && other.kind == Kind::Directory),
    };
    plain && is_new && in_directory
}

/// In an empty directory.
fn make_tree(nodes: &[Node], root: &Path) -> io::Result<()> {
    for node in nodes {
        let at = place(node, root);
        let special = |kind, device| mknodat(CWD, &at, kind, Mode::from_raw_mode(0o600), device);
        match &node.kind {
            Kind::Directory if node.path.as_os_str().is_empty() => {}
            Kind::Directory => DirBuilder::new().mode(0o700).create(&at)?,
            Kind::File(content) => {
                File::options().write(true).create_new(true).mode(0o600).open(&at)?.write_all(content)?;
            }
            Kind::Symlink(target) => std::os::unix::fs::symlink(target, &at)?,
            Kind::Character(device) => special(FileType::CharacterDevice, *device)?,
            Kind::Block(device) => special(FileType::BlockDevice, *device)?,
            Kind::Fifo => special(FileType::Fifo, 0)?,
        }
        lchown(&at, Some(node.uid), Some(node.gid))?;
        if !matches!(node.kind, Kind::Symlink(_)) {
            fs::set_permissions(&at, fs::Permissions::from_mode(node.mode))?;
        }
    }
    // The times of a directory change with what is made in it.
    nodes.iter().try_for_each(|node| {
        let time = Timespec { tv_sec: node.mtime.try_into().unwrap_or(i64::MAX), tv_nsec: 0 };
        let times = Timestamps { last_access: time, last_modification: time };
        Ok(utimensat(CWD, place(node, root), &times, AtFlags::SYMLINK_NOFOLLOW)?)
    })
}

fn place(node: &Node, root: &Path) -> PathBuf {
    // Joining an empty path would end this one with a slash.
    if node.path.as_os_str().is_empty() { root.to_owned() } else { root.join(&node.path) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Something of everything.
    fn tree(root: &Path) -> Vec<Node> {
        let node = |path: &str, kind, mode| Node {
            path: path.into(),
            kind,
            mode,
            uid: 1000,
            gid: 3_000_000,
            mtime: 1_700_000_000,
        };
        let nodes = vec![
            node("", Kind::Directory, 0o1777),
            node("pts", Kind::Directory, 0o750),
            node("pts/deep", Kind::Directory, 0),
            node("pts/deep/file", Kind::File(b"content".to_vec()), 0o4711),
            node("null", Kind::Character(makedev(1, 3)), 0o666),
            node("disk", Kind::Block(makedev(259, 70_000)), 0o640),
            node("fifo", Kind::Fifo, 0o600),
            node("stdin", Kind::Symlink("/proc/self/fd/0".into()), 0o777),
        ];
        make_tree(&nodes, root).unwrap();
        nodes
    }

    fn sorted(mut nodes: Vec<Node>) -> Vec<Node> {
        nodes.sort_by(|a, b| a.path.cmp(&b.path));
        nodes
    }

    fn read(dir: &Path) -> Vec<Node> {
        sorted(read_tree(dir).unwrap().unwrap())
    }

    #[expect(clippy::disallowed_methods, reason = "a test waits for it at once")]
    fn gnu_tar(args: &[&str], dir: &Path, input: &[u8]) -> Vec<u8> {
        let file = dir.with_extension("input");
        fs::write(&file, input).unwrap();
        let mut tar = Command::new("tar");
        tar.args(args).arg(dir).stdin(File::open(&file).unwrap());
        let output = if args[0] == "--create" { tar.arg(".").output() } else { tar.output() }.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    }

    fn archive(nodes: &[Node]) -> Vec<u8> {
        let mut output = GzEncoder::new(Vec::new(), Compression::fast());
        write_archive(nodes, &mut output).unwrap();
        output.finish().unwrap()
    }

    #[test]
    fn archives_are_those_of_gnu_tar() {
        let dir = tempfile::tempdir().unwrap();
        let [one, two, three] = ["one", "two", "three"].map(|name| {
            fs::create_dir(dir.path().join(name)).unwrap();
            dir.path().join(name)
        });
        let nodes = sorted(tree(&one));
        assert_eq!(read(&one), nodes);
        // Ours, read by the other.
        gnu_tar(&EXTRACT, &two, &archive(&read_tree(&one).unwrap().unwrap()));
        assert_eq!(read(&two), nodes);
        // The other's, read by us.
        let theirs = gnu_tar(&CREATE[..10], &one, b"");
        make_tree(&read_archive(theirs.as_slice()).unwrap().unwrap(), &three).unwrap();
        assert_eq!(read(&three), nodes);
    }

    #[test]
    fn what_is_not_plain_is_for_gnu_tar() {
        let dir = tempfile::tempdir().unwrap();
        let root = |name: &str| {
            let root = dir.path().join(name);
            fs::create_dir(&root).unwrap();
            root
        };
        let links = root("links");
        fs::write(links.join("a"), "x").unwrap();
        fs::hard_link(links.join("a"), links.join("b")).unwrap();
        let large = root("large");
        fs::write(large.join("a"), vec![0; MAX_BYTES as usize]).unwrap();
        let many = root("many");
        (0..MAX_ENTRIES).for_each(|number| fs::write(many.join(number.to_string()), "").unwrap());
        let long = root("long");
        fs::write(long.join("x".repeat(120)), "").unwrap();
        for root in [links, large, many, long] {
            assert_eq!(read_tree(&root).unwrap(), None, "{}", root.display());
            assert_eq!(read_archive(gnu_tar(&CREATE[..10], &root, b"").as_slice()).unwrap(), None);
        }
    }

    #[test]
    fn nothing_leads_out_of_the_directory() {
        let node = |path: &str, kind| Node { path: path.into(), kind, mode: 0o755, uid: 0, gid: 0, mtime: 0 };
        let root = node("", Kind::Directory);
        let file = |path| node(path, Kind::File(b"x".to_vec()));
        let cases = [
            vec![root.clone(), file("../x")],
            vec![root.clone(), file("/etc/x")],
            vec![root.clone(), node("a", Kind::Symlink("/etc".into())), file("a/x")],
            vec![
                root.clone(),
                node("a", Kind::Directory),
                node("a", Kind::Symlink("/etc".into())),
                file("a/x"),
            ],
            vec![root.clone(), file("a/x")],
            vec![node("", Kind::Symlink("/etc".into()))],
            vec![file("x")],
        ];
        for nodes in cases {
            assert_eq!(read_archive(archive(&nodes).as_slice()).unwrap(), None, "{nodes:?}");
        }
        assert!(read_archive(archive(&[root]).as_slice()).unwrap().is_some());
    }
}
