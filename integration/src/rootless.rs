//! A Podman of an ordinary user, with its programs of one Debian release, on a host of its own.
//!
//! The user exists on that host only. It has ranges of further users and groups (subuid(5)), device nodes with the modes
//! that distributions give them, and copies of the programs and of machinen's files in a directory that it may read: those
//! of the checkout may be in the home of root.

use std::{
    fs,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt, chown},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

use crate::{
    paths,
    podman::{PodmanCommands, Version},
    private_host::PrivateHost,
    process::Invocation,
};

/// The user and its group.
const USER: u32 = 61_500;
const NAME: &str = "machinen-user";

/// Programs of the host, of the Debian packages `uidmap` and `util-linux`.
const NEWUIDMAP: &str = "/usr/bin/newuidmap";

/// The device nodes that each user may open, and their numbers.
const DEVICES: [(&str, u64, u64); 2] = [("/dev/fuse", 10, 229), ("/dev/net/tun", 10, 200)];

/// Has the copies of programs of another suite find their copied libraries and dynamic linker.
const RELOCATE: &str = r#"
find "$1/usr/bin" "$1/usr/lib" -type f | while read -r file; do
    path=$(patchelf --print-rpath "$file" 2> /dev/null) || continue
    case $path in "$0"*) patchelf --force-rpath --set-rpath "$1${path#"$0"}" "$file" ;; esac
    linker=$(patchelf --print-interpreter "$file" 2> /dev/null) || continue
    case $linker in "$0"*) patchelf --set-interpreter "$1${linker#"$0"}" "$file" ;; esac
done
"#;

/// A Podman of an ordinary user, whose containers have VMs.
#[derive(Debug)]
pub struct RootlessPodman {
    host: PrivateHost,
}

impl RootlessPodman {
    /// Makes the host and the user.
    ///
    /// # Errors
    /// `make setup` has not run, machinen has not been built, or the host cannot be made.
    pub fn start(version: Version) -> Result<Self> {
        ensure!(Path::new(NEWUIDMAP).exists(), "{NEWUIDMAP} is missing: run `make setup`");
        let host = PrivateHost::start(|root| prepare(root, version))?;
        for (device, ..) in DEVICES {
            let node = host.root().join("user").join(name_of(device));
            host.program("mount")?.arg("--bind").arg(node).arg(device).run()?.ok()?;
        }
        let run = host.path("/run/user");
        fs::create_dir(&run).with_context(|| format!("cannot make {}", run.display()))?;
        own_dir(&run.join(USER.to_string()))?;
        Ok(Self { host })
    }

    /// The user's number on the host.
    pub fn user(&self) -> u32 {
        USER
    }

    /// The host.
    pub fn host(&self) -> &PrivateHost {
        &self.host
    }

    /// The home directory of the user.
    pub fn home(&self) -> PathBuf {
        self.host.root().join("user/home")
    }

    /// A program that the user runs.
    ///
    /// # Errors
    /// The programs of this crate have not been built.
    pub fn program(&self, program: impl AsRef<Path>) -> Result<Invocation> {
        let user = [format!("--reuid={USER}"), format!("--regid={USER}"), "--clear-groups".to_owned()];
        let run = self.host.program("setpriv")?.args(user).arg(program.as_ref());
        let home = self.home();
        Ok(run
            .env("HOME", &home)
            .env("USER", NAME)
            .env("TMPDIR", &home)
            .env("XDG_RUNTIME_DIR", format!("/run/user/{USER}"))
            .env("PODMAN_IGNORE_CGROUPSV1_WARNING", "1")
            .current_dir("/"))
    }
}

impl PodmanCommands for RootlessPodman {
    fn podman(&self, args: &[&str]) -> Result<Invocation> {
        Ok(self.program(self.host.root().join("user/usr/bin/podman"))?.args(args))
    }

    fn exchange(&self) -> PathBuf {
        self.home()
    }
}

fn prepare(root: &Path, version: Version) -> Result<()> {
    let (dir, user, etc) = (version.dir()?, root.join("user"), root.join("etc"));
    // Other users of the machine may pass the directory, and read nothing else in it.
    fs::set_permissions(root, PermissionsExt::from_mode(0o711))?;
    fs::create_dir(&user)?;
    fs::set_permissions(&user, PermissionsExt::from_mode(0o755))?;
    own_dir(&user.join("home"))?;
    Invocation::new("cp").arg("-rL").arg(dir.join("usr")).arg(&user).run()?.ok()?;
    Invocation::new("sh").args(["-c", RELOCATE]).arg(dir.canonicalize()?).arg(&user).run()?.ok()?;
    Invocation::new("cp").arg("-a").arg(dir.join("etc/.")).arg(&etc).run()?.ok()?;
    fs::copy(paths::release_dir()?.join("machinen"), user.join("machinen"))?;
    let assets = user.join("guest");
    fs::create_dir(&assets)?;
    fs::set_permissions(&assets, PermissionsExt::from_mode(0o755))?;
    for name in ["vmlinux", "guest.img"] {
        fs::copy(paths::assets().join(name), assets.join(name))?;
        fs::set_permissions(assets.join(name), PermissionsExt::from_mode(0o644))?;
    }
    for (device, major, minor) in DEVICES {
        let node = user.join(name_of(device));
        let numbers = [major.to_string(), minor.to_string()];
        Invocation::new("mknod").args(["-m", "666"]).arg(&node).arg("c").args(numbers).run()?.ok()?;
    }
    let append = |file: &str, line: String| -> Result<()> {
        let present = fs::read_to_string(Path::new("/etc").join(file)).unwrap_or_default();
        fs::write(etc.join(file), present + &line).with_context(|| format!("cannot write {file}"))
    };
    append("passwd", format!("{NAME}:x:{USER}:{USER}::{}:/bin/sh\n", user.join("home").display()))?;
    append("group", format!("{NAME}:x:{USER}:\n"))?;
    for file in ["subuid", "subgid"] {
        append(file, format!("{NAME}:1000000:65536\n"))?;
    }
    configure(root, version)
}

/// The configurations of Podman, its storage and machinen.
fn configure(root: &Path, version: Version) -> Result<()> {
    let (user, containers) = (root.join("user"), root.join("etc/containers"));
    let usr = user.join("usr");
    let backend = match version {
        Version::V4 => "cni",
        Version::V5 => "netavark",
    };
    let config = format!(
        "[containers]\nlog_driver = \"k8s-file\"\ninit_path = {:?}\n\
         default_ulimits = [\"nofile=1024:1024\", \"nproc=1024:1024\"]\n\
         [network]\nnetwork_backend = \"{backend}\"\n\
         [engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\nlock_type = \"file\"\n\
         conmon_path = [{:?}]\nhelper_binaries_dir = [{:?}, {:?}, {:?}]\n\
         runtime = \"machinen\"\n[engine.runtimes]\nmachinen = [{:?}]\n",
        usr.join("bin/catatonit"),
        usr.join("bin/conmon"),
        usr.join("lib/podman"),
        usr.join("libexec/podman"),
        usr.join("bin"),
        user.join("machinen"),
    );
    fs::write(containers.join("containers.conf"), config).context("cannot configure Podman")?;
    // The older version does not commit a container without these two.
    let storage = format!(
        "[storage]\ndriver = \"overlay\"\nrunroot = \"/run/user/{USER}/containers\"\ngraphroot = {:?}\n",
        user.join("home/.local/share/containers/storage")
    );
    fs::write(containers.join("storage.conf"), storage).context("cannot configure Podman's storage")?;
    let machinen = root.join("etc/machinen");
    fs::create_dir_all(&machinen)?;
    let text =
        format!("[assets]\ndir = {:?}\n[pool]\nsize = 0\n[template]\nmode = \"off\"\n", user.join("guest"));
    fs::write(machinen.join("machinen.toml"), text).context("cannot configure machinen")
}

fn name_of(device: &str) -> String {
    device.trim_start_matches('/').replace('/', "-")
}

/// Makes a directory of the user's own.
fn own_dir(path: &Path) -> Result<()> {
    let made = || {
        fs::DirBuilder::new().mode(0o700).create(path)?;
        chown(path, Some(USER), Some(USER))
    };
    made().with_context(|| format!("cannot make {}", path.display()))
}
