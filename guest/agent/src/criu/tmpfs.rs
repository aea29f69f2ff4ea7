//! The program that CRIU runs as `tar` for each tmpfs of a container, to pack its files into an image or to
//! unpack them.
//!
//! GNU tar is three programs, since a shell runs gzip for it. Starting them, five times and for nearly empty
//! directories, took most of the time of a small container's dump and restore. So this program, which is in
//! memory anyway, packs small and plain trees itself, and leaves all others to GNU tar. The archives are the
//! same.

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

/// Directory in the guest image that has the agent under the name `tar`.
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
/// The directory is the next argument.
const EXTRACT: [&str; 5] = ["--extract", "--gzip", "--no-unquote", "--no-wildcards", "--directory"];

/// Limits of a small tree: entries, and bytes of the archive before compression.
const MAX_ENTRIES: usize = 256;
const MAX_BYTES: u64 = 512 << 10;
/// Longest name that fits into the header of every archive format; a name must not fill its field.
const MAX_NAME: usize = 99;

/// One file of a tmpfs.
#[derive(Debug, Clone, PartialEq, Eq)]
struct TmpfsFile {
    /// Relative to the root, whose path is empty. A file comes after its directory.
    path: PathBuf,
    kind: FileKind,
    mode: u32,
    uid: u32,
    gid: u32,
    /// Seconds since the Unix epoch; archives have nothing finer.
    mtime: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum FileKind {
    Directory,
    File(Vec<u8>),
    Symlink(PathBuf),
    Character(Dev),
    Block(Dev),
    Fifo,
}

/// Does tar's work, if this program was started as tar.
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
    // The format of tar's messages; CRIU writes them into its log.
    eprintln!("tar: {error}");
    Some(ExitCode::from(2))
}

/// Packs the tree. False when nothing was done, because the tree is for GNU tar.
fn create() -> io::Result<bool> {
    let Some(nodes) = read_tree(Path::new(SOURCE))? else { return Ok(false) };
    let mut output = GzEncoder::new(io::stdout().lock(), Compression::fast());
    write_archive(&nodes, &mut output)?;
    output.finish()?.flush()?;
    Ok(true)
}

/// Unpacks into `dir`. False as for [`create`].
fn extract(dir: &Path) -> io::Result<bool> {
    // Existing files need GNU tar's rules.
    let nodes = if fs::read_dir(dir)?.next().is_none() { read_archive(io::stdin().lock())? } else { None };
    let Some(nodes) = nodes else {
        File::from(rustix::io::dup(io::stdin())?).rewind()?;
        return Ok(false);
    };
    make_tree(&nodes, dir)?;
    Ok(true)
}

/// Reads a tree. None when the tree is large, or has a file that is not plain.
fn read_tree(root: &Path) -> io::Result<Option<Vec<TmpfsFile>>> {
    // Follows the link, unlike for the entries below.
    let device = fs::metadata(root)?.dev();
    let (mut nodes, mut bytes): (Vec<TmpfsFile>, u64) = (Vec::new(), 0);
    let mut pending = vec![PathBuf::new()];
    while let Some(path) = pending.pop() {
        let at = root.join(&path);
        let status =
            if path.as_os_str().is_empty() { fs::metadata(root)? } else { fs::symlink_metadata(&at)? };
        let kind = status.file_type();
        // An archive cannot hold sockets; CRIU restores them itself.
        if kind.is_socket() {
            continue;
        }
        bytes += 512 + if kind.is_file() { status.len() } else { 0 };
        let linked = !kind.is_dir() && status.nlink() > 1;
        if linked || bytes > MAX_BYTES || nodes.len() == MAX_ENTRIES || status.mtime() < 0 {
            return Ok(None);
        }
        let kind = match kind {
            _ if kind.is_dir() => FileKind::Directory,
            _ if kind.is_file() => FileKind::File(fs::read(&at)?),
            _ if kind.is_symlink() => FileKind::Symlink(fs::read_link(&at)?),
            _ if kind.is_char_device() => FileKind::Character(status.rdev()),
            _ if kind.is_block_device() => FileKind::Block(status.rdev()),
            _ => FileKind::Fifo,
        };
        if matches!(kind, FileKind::Directory) && status.dev() == device {
            for entry in fs::read_dir(&at)? {
                pending.push(path.join(entry?.file_name()));
            }
        }
        let (mode, uid, gid) = (status.mode() & 0o7777, status.uid(), status.gid());
        let node = TmpfsFile { path, kind, mode, uid, gid, mtime: status.mtime().unsigned_abs() };
        if name(&node).len() > MAX_NAME || link(&node).len() > MAX_NAME {
            return Ok(None);
        }
        nodes.push(node);
    }
    Ok(Some(nodes))
}

/// The file's name in archives.
fn name(node: &TmpfsFile) -> Vec<u8> {
    let mut name = b"./".to_vec();
    name.extend(node.path.as_os_str().as_bytes());
    if matches!(node.kind, FileKind::Directory) && name.len() > 2 {
        name.push(b'/');
    }
    name
}

fn link(node: &TmpfsFile) -> &[u8] {
    if let FileKind::Symlink(target) = &node.kind { target.as_os_str().as_bytes() } else { b"" }
}

fn write_archive(nodes: &[TmpfsFile], output: impl Write) -> io::Result<()> {
    let mut archive = Builder::new(output);
    for node in nodes {
        let mut header = Header::new_gnu();
        let (kind, content, device): (_, &[u8], _) = match &node.kind {
            FileKind::Directory => (EntryType::Directory, b"", None),
            FileKind::File(content) => (EntryType::Regular, content, None),
            FileKind::Symlink(_) => (EntryType::Symlink, b"", None),
            FileKind::Character(device) => (EntryType::Char, b"", Some(*device)),
            FileKind::Block(device) => (EntryType::Block, b"", Some(*device)),
            FileKind::Fifo => (EntryType::Fifo, b"", None),
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

/// Reads an archive. None when the archive is large, or has a file that is not plain.
fn read_archive(compressed: impl Read) -> io::Result<Option<Vec<TmpfsFile>>> {
    let mut bytes = Vec::new();
    // GNU tar has to judge an archive in another format.
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
            EntryType::Directory => FileKind::Directory,
            EntryType::Regular => {
                let mut content = Vec::new();
                entry.read_to_end(&mut content)?;
                FileKind::File(content)
            }
            EntryType::Symlink => {
                let target = entry.link_name_bytes().unwrap_or_default().into_owned();
                FileKind::Symlink(OsString::from_vec(target).into())
            }
            EntryType::Char => FileKind::Character(device()?),
            EntryType::Block => FileKind::Block(device()?),
            EntryType::Fifo => FileKind::Fifo,
            _ => return Ok(None),
        };
        let named = PathBuf::from(OsString::from_vec(entry.path_bytes().into_owned()));
        let path: PathBuf = named.components().filter(|part| *part != Component::CurDir).collect();
        let number = |value: u64| u32::try_from(value).map_err(|_| io::ErrorKind::InvalidData);
        let (uid, gid) = (number(header.uid()?)?, number(header.gid()?)?);
        let node = TmpfsFile { path, kind, mode: header.mode()? & 0o7777, uid, gid, mtime: header.mtime()? };
        if nodes.len() == MAX_ENTRIES || !is_below(&node, &nodes) {
            return Ok(None);
        }
        nodes.push(node);
    }
    Ok(Some(nodes))
}

/// Whether the file's directory was created before and the file was not, so that no link leads elsewhere. The
/// root is first.
fn is_below(node: &TmpfsFile, before: &[TmpfsFile]) -> bool {
    let plain = node.path.components().all(|part| matches!(part, Component::Normal(_)));
    let is_new = before.iter().all(|other| other.path != node.path);
    let in_directory = match node.path.parent() {
        None => before.is_empty() && node.kind == FileKind::Directory,
        Some(parent) => before.iter().any(|other| other.path == parent && other.kind == FileKind::Directory),
    };
    plain && is_new && in_directory
}

/// Creates the files in an empty directory.
fn make_tree(nodes: &[TmpfsFile], root: &Path) -> io::Result<()> {
    for node in nodes {
        let at = path_of(node, root);
        let special = |kind, device| mknodat(CWD, &at, kind, Mode::from_raw_mode(0o600), device);
        match &node.kind {
            FileKind::Directory if node.path.as_os_str().is_empty() => {}
            FileKind::Directory => DirBuilder::new().mode(0o700).create(&at)?,
            FileKind::File(content) => {
                File::options().write(true).create_new(true).mode(0o600).open(&at)?.write_all(content)?;
            }
            FileKind::Symlink(target) => std::os::unix::fs::symlink(target, &at)?,
            FileKind::Character(device) => special(FileType::CharacterDevice, *device)?,
            FileKind::Block(device) => special(FileType::BlockDevice, *device)?,
            FileKind::Fifo => special(FileType::Fifo, 0)?,
        }
        lchown(&at, Some(node.uid), Some(node.gid))?;
        if !matches!(node.kind, FileKind::Symlink(_)) {
            fs::set_permissions(&at, fs::Permissions::from_mode(node.mode))?;
        }
    }
    // Creating a file changes its directory's times, so these are set at the end.
    nodes.iter().try_for_each(|node| {
        let time = Timespec { tv_sec: node.mtime.try_into().unwrap_or(i64::MAX), tv_nsec: 0 };
        let times = Timestamps { last_access: time, last_modification: time };
        Ok(utimensat(CWD, path_of(node, root), &times, AtFlags::SYMLINK_NOFOLLOW)?)
    })
}

fn path_of(node: &TmpfsFile, root: &Path) -> PathBuf {
    // Joining an empty path would end this one with a slash.
    if node.path.as_os_str().is_empty() { root.to_owned() } else { root.join(&node.path) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tree with a file of each kind.
    fn tree(root: &Path) -> Vec<TmpfsFile> {
        let node = |path: &str, kind, mode| TmpfsFile {
            path: path.into(),
            kind,
            mode,
            uid: 1000,
            gid: 3_000_000,
            mtime: 1_700_000_000,
        };
        let nodes = vec![
            node("", FileKind::Directory, 0o1777),
            node("pts", FileKind::Directory, 0o750),
            node("pts/deep", FileKind::Directory, 0),
            node("pts/deep/file", FileKind::File(b"content".to_vec()), 0o4711),
            node("null", FileKind::Character(makedev(1, 3)), 0o666),
            node("disk", FileKind::Block(makedev(259, 70_000)), 0o640),
            node("fifo", FileKind::Fifo, 0o600),
            node("stdin", FileKind::Symlink("/proc/self/fd/0".into()), 0o777),
        ];
        make_tree(&nodes, root).unwrap();
        nodes
    }

    fn sorted(mut nodes: Vec<TmpfsFile>) -> Vec<TmpfsFile> {
        nodes.sort_by(|a, b| a.path.cmp(&b.path));
        nodes
    }

    fn read(dir: &Path) -> Vec<TmpfsFile> {
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

    fn archive(nodes: &[TmpfsFile]) -> Vec<u8> {
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
        // This program's archive, unpacked by GNU tar.
        gnu_tar(&EXTRACT, &two, &archive(&read_tree(&one).unwrap().unwrap()));
        assert_eq!(read(&two), nodes);
        // GNU tar's archive, unpacked by this program.
        let theirs = gnu_tar(&CREATE[..10], &one, b"");
        make_tree(&read_archive(theirs.as_slice()).unwrap().unwrap(), &three).unwrap();
        assert_eq!(read(&three), nodes);
    }

    #[test]
    fn trees_that_are_not_plain_are_left_to_gnu_tar() {
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
    fn no_path_leads_out_of_the_directory() {
        let node =
            |path: &str, kind| TmpfsFile { path: path.into(), kind, mode: 0o755, uid: 0, gid: 0, mtime: 0 };
        let root = node("", FileKind::Directory);
        let file = |path| node(path, FileKind::File(b"x".to_vec()));
        let cases = [
            vec![root.clone(), file("../x")],
            vec![root.clone(), file("/etc/x")],
            vec![root.clone(), node("a", FileKind::Symlink("/etc".into())), file("a/x")],
            vec![
                root.clone(),
                node("a", FileKind::Directory),
                node("a", FileKind::Symlink("/etc".into())),
                file("a/x"),
            ],
            vec![root.clone(), file("a/x")],
            vec![node("", FileKind::Symlink("/etc".into()))],
            vec![file("x")],
        ];
        for nodes in cases {
            assert_eq!(read_archive(archive(&nodes).as_slice()).unwrap(), None, "{nodes:?}");
        }
        assert!(read_archive(archive(&[root]).as_slice()).unwrap().is_some());
    }
}
