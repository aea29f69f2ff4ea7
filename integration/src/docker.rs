//! A private Docker daemon with its command line, on top of a private containerd.
//!
//! dockerd is a descendant of that containerd's keeper, which kills it at the end and removes its files: all of them
//! are below the containerd's root. It has a network namespace of its own, in which it makes its bridges and its rules of
//! iptables, so it changes nothing of the host.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::json;

use crate::{
    containerd::Containerd,
    cri::OTHER_CONFIGURATION,
    image::Image,
    paths,
    process::{DEADLINE, Invocation, Output, wait_for_end},
};

/// The name under which Docker has machinen's runtime.
pub const MACHINEN: &str = "machinen";
/// The name under which Docker has machinen's runtime with a configuration of its own, the file [`OTHER_CONFIGURATION`]
/// in the directory of its containerd.
pub const MACHINEN_OTHER: &str = "machinen-other";
/// The name under which Docker has the host's runc.
pub const RUNC: &str = "runc";

/// A running Docker daemon.
#[derive(Debug)]
pub struct Docker<'a> {
    containerd: &'a Containerd,
    dir: PathBuf,
    pid: u32,
}

impl<'a> Docker<'a> {
    /// Starts dockerd and waits until it serves. A containerd has one at most. `runtime` is the one of containers that name
    /// none.
    ///
    /// # Errors
    /// `make setup` has not run, or dockerd does not start; containerd's log has its messages.
    pub fn start(containerd: &'a Containerd, runtime: &str) -> Result<Self> {
        let dir = containerd.root().join("docker");
        for name in ["", "client"] {
            fs::create_dir(dir.join(name)).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        let mut docker = Self { containerd, dir, pid: 0 };
        let plugins = docker.dir.join("client/cli-plugins");
        fs::create_dir(&plugins)?;
        for plugin in ["docker-compose", "docker-buildx"] {
            symlink(paths::docker_program("libexec/docker/cli-plugins", plugin)?, plugins.join(plugin))?;
        }
        // BuildKit runs the steps of a build by the program of this name, whatever runtimes the daemon knows.
        let programs = docker.dir.join("programs");
        fs::create_dir(&programs)?;
        if runtime == MACHINEN {
            symlink(paths::release_dir()?.join("machinen"), programs.join("runc"))?;
        }
        docker.write_configuration(runtime)?;
        let from = containerd.log().position();
        let program = paths::docker_program("sbin", "dockerd")?;
        let config = docker.dir.join("daemon.json");
        // The script ends at once, and dockerd stays a descendant of the keeper.
        let script = format!(
            "PATH={}:$PATH setsid unshare --net sh -c 'ip link set lo up && exec {} --config-file {}' </dev/null &\n",
            programs.display(),
            program.display(),
            config.display()
        );
        containerd.run_script(&script)?;
        containerd.log().wait_for(from, |line| line.contains("API listen on"))?;
        docker.pid = fs::read_to_string(docker.dir.join("pid"))?.trim().parse()?;
        Ok(docker)
    }

    fn write_configuration(&self, runtime: &str) -> Result<()> {
        let below = |name: &str| self.dir.join(name);
        let namespace = self.containerd.namespace();
        let other = self.containerd.root().join(OTHER_CONFIGURATION);
        let config = json!({
            "hosts": [format!("unix://{}", self.socket().display())],
            "containerd": self.containerd.socket(),
            "containerd-namespace": namespace,
            "data-root": below("data"),
            "exec-root": below("run"),
            "pidfile": below("pid"),
            // The keeper removes the groups of this name.
            "cgroup-parent": format!("/{namespace}"),
            "userland-proxy-path": paths::docker_program("sbin", "docker-proxy")?,
            "init-path": paths::docker_program("bin", "docker-init")?,
            // Builds take this one.
            "default-runtime": runtime,
            "debug": true,
            "runtimes": {
                MACHINEN: { "runtimeType": "io.machinen.v1" },
                MACHINEN_OTHER: { "runtimeType": "io.machinen.v1", "options": { "ConfigPath": other } },
            },
        });
        Ok(fs::write(below("daemon.json"), config.to_string())?)
    }

    /// The daemon's own socket.
    pub fn socket(&self) -> PathBuf {
        self.containerd.root().join("d.sock")
    }

    /// The containerd that the daemon uses.
    pub fn containerd(&self) -> &Containerd {
        self.containerd
    }

    /// The directory of the daemon, in which a test may have files.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Ends the daemon.
    ///
    /// # Errors
    /// The daemon does not end.
    pub fn stop(self) -> Result<()> {
        kill(Pid::from_raw(self.pid.cast_signed()), Signal::SIGTERM)?;
        ensure!(wait_for_end(self.pid, DEADLINE)?, "dockerd did not end within {DEADLINE:?}");
        Ok(())
    }

    /// A `docker` command line for this daemon.
    ///
    /// # Errors
    /// `make setup` has not run.
    pub fn docker(&self, args: &[&str]) -> Result<Invocation> {
        Ok(Invocation::new(paths::docker_program("bin", "docker")?)
            .env("DOCKER_HOST", format!("unix://{}", self.socket().display()))
            .env("DOCKER_CONFIG", self.dir.join("client"))
            .args(args))
    }

    /// Runs `docker`, whatever its status.
    ///
    /// # Errors
    /// The program cannot be run, or exceeds its deadline.
    pub fn output(&self, args: &[&str]) -> Result<Output> {
        self.docker(args)?.run()
    }

    /// Runs `docker`, and returns what it prints without the last line end.
    ///
    /// # Errors
    /// The program failed; both of its streams are quoted.
    pub fn ok(&self, args: &[&str]) -> Result<String> {
        Ok(self.output(args)?.ok()?.text().trim_end().to_owned())
    }

    /// A program in the network namespace of the daemon, as on the host that the daemon serves.
    pub fn in_daemons_network(&self, args: &[&str]) -> Invocation {
        let namespace = format!("--net=/proc/{}/ns/net", self.pid);
        Invocation::new("nsenter").arg(namespace).args(args.iter().copied())
    }

    /// Imports the files of an image with one layer.
    ///
    /// # Errors
    /// The image cannot be written or imported.
    pub fn import(&self, image: &Image) -> Result<()> {
        let (files, archive) = (self.dir.join("image"), self.dir.join("image.tar"));
        image.unpack(&files)?;
        let tar = Invocation::new("tar").arg("-C").arg(&files).arg("-cf").arg(&archive).arg(".");
        tar.run()?.ok()?;
        let change = ["--change", "ENV PATH=/usr/sbin:/usr/bin:/sbin:/bin", "--change", "CMD [\"/bin/sh\"]"];
        let import = self.docker(&["import"])?.args(change).arg(&archive).arg(image.name());
        import.run()?.ok()?;
        fs::remove_file(&archive)?;
        Ok(fs::remove_dir_all(&files)?)
    }
}
