//! What a container has written becomes an image or a list of changes, and images are built.

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use machinen_integration::docker::{Docker, MACHINEN};
use serde_json::Value;

use super::with_docker;
use crate::harness::IMAGE;

with_docker!(runc, RUNC: commit_and_diff, committed_while_it_runs, a_build, a_build_by_buildkit);
with_docker!(
    machinen, MACHINEN: commit_and_diff, committed_while_it_runs, a_build, a_build_by_buildkit,
    containers_of_an_image_have_one_base_disk
);

fn commit_and_diff(docker: &Docker<'_>, runtime: &str) -> Result<()> {
    let script = "echo written > /written; rm /etc/passwd; mkdir -p /made/inside; adduser -D someone 2> /dev/null; true";
    docker.ok(&["run", "--name", "source", "--runtime", runtime, IMAGE, "sh", "-c", script])?;
    let changes = docker.ok(&["diff", "source"])?;
    for wanted in ["A /written", "C /etc", "A /made", "A /made/inside"] {
        ensure!(changes.lines().any(|line| line == wanted), "no {wanted:?} in\n{changes}");
    }
    docker.ok(&["commit", "--change", "CMD [\"cat\", \"/written\"]", "source", "committed"])?;
    let output = docker.ok(&["run", "--rm", "--runtime", runtime, "committed"])?;
    ensure!(output == "written", "{output}");
    // The container continues with its own files when it is started again.
    docker.ok(&["start", "source"])?;
    docker.ok(&["wait", "source"])?;
    docker.ok(&["rm", "source"])?;
    docker.ok(&["rmi", "committed"]).map(drop)
}

/// dockerd pauses the container, and has its files mounted all the time.
fn committed_while_it_runs(docker: &Docker<'_>, runtime: &str) -> Result<()> {
    docker.ok(&["run", "-d", "--name", "live", "--runtime", runtime, IMAGE, "sleep", "1000"])?;
    for name in ["one", "two"] {
        docker.ok(&["exec", "live", "sh", "-c", &format!("echo {name} > /{name}")])?;
        docker.ok(&["commit", "live", name])?;
        let file = format!("/{name}");
        let output = docker.ok(&["run", "--rm", "--runtime", runtime, name, "cat", &file])?;
        ensure!(output == name, "{output}");
        docker.ok(&["diff", "live"])?;
    }
    docker.ok(&["stop", "--time", "1", "live"])?;
    let changes = docker.ok(&["diff", "live"])?;
    ensure!(changes.contains("A /one") && changes.contains("A /two"), "{changes}");
    docker.ok(&["rm", "live"])?;
    docker.ok(&["rmi", "one", "two"]).map(drop)
}

/// The steps of the classic builder, each of them a container.
fn a_build(docker: &Docker<'_>, runtime: &str) -> Result<()> {
    let dir = docker.dir().join("context");
    fs::create_dir(&dir)?;
    fs::write(dir.join("given"), "given\n")?;
    let file = format!(
        "FROM {IMAGE}\nCOPY given /given\nRUN tr a-z A-Z < /given > /upper && echo built by $(uname -n)\n\
         ENV NAME=value\nRUN test $NAME = value && ln -s upper /link\nCMD [\"cat\", \"/link\"]\n"
    );
    fs::write(dir.join("Dockerfile"), file)?;
    let build =
        docker.docker(&["build", "--tag", "built", &dir.display().to_string()])?.env("DOCKER_BUILDKIT", "0");
    build.deadline(Duration::from_secs(120)).run()?.ok()?;
    let output = docker.ok(&["run", "--rm", "--runtime", runtime, "built"])?;
    ensure!(output == "GIVEN", "{output}");
    docker.ok(&["rmi", "built"])?;
    Ok(fs::remove_dir_all(dir)?)
}

/// The steps by the OCI command line, with the mounts that only BuildKit has. Two of them run at once.
fn a_build_by_buildkit(docker: &Docker<'_>, runtime: &str) -> Result<()> {
    let dir = docker.dir().join("context");
    fs::create_dir(&dir)?;
    fs::write(dir.join("given"), "given\n")?;
    fs::write(docker.dir().join("token"), "hidden\n")?;
    let file = format!(
        "FROM {IMAGE} AS one\n\
         RUN --mount=type=cache,target=/cache echo cached >>/cache/f && cat /cache/f >/lines\n\
         RUN uname -r >/kernel\n\
         FROM {IMAGE} AS two\n\
         RUN --mount=type=secret,id=token --mount=type=bind,target=/src \\\n\
         \x20   tr a-z A-Z </run/secrets/token >/upper && cp /src/given /copied && ip link show eth0\n\
         FROM {IMAGE}\n\
         COPY --from=one /lines /kernel /\n\
         COPY --from=two /upper /copied /\n\
         CMD [\"cat\", \"/lines\", \"/upper\", \"/copied\", \"/kernel\"]\n"
    );
    fs::write(dir.join("Dockerfile"), file)?;
    let (secret, context) =
        (format!("id=token,src={}", docker.dir().join("token").display()), dir.display().to_string());
    let args = ["buildx", "build", "--progress", "plain", "--tag", "built", "--secret", &secret, &context];
    docker.docker(&args)?.deadline(Duration::from_secs(120)).run()?.ok()?;
    let output = docker.ok(&["run", "--rm", "--runtime", runtime, "built"])?;
    let (lines, kernel) = output.split_once("given").with_context(|| output.clone())?;
    ensure!(lines == "cached\nHIDDEN\n", "{output}");
    ensure!(kernel.trim().ends_with("-machinen") == (runtime == MACHINEN), "the steps ran on {kernel:?}");

    fs::write(dir.join("Dockerfile"), format!("FROM {IMAGE}\nRUN echo before; exit 7\n"))?;
    let failed = docker.docker(&["buildx", "build", "--progress", "plain", &context])?.run()?;
    ensure!(failed.status == 1 && format!("{failed}").contains("exit code: 7"), "{failed}");
    docker.ok(&["rmi", "built"])?;
    docker.ok(&["buildx", "prune", "--all", "--force"])?;
    fs::remove_dir_all(dir)?;
    remove_buildkits_groups(docker)
}

/// BuildKit makes a group for its steps in each hierarchy of cgroups, and leaves it, with runc too. It is empty.
fn remove_buildkits_groups(docker: &Docker<'_>) -> Result<()> {
    let group = Path::new(docker.containerd().namespace()).join("buildkit");
    let hierarchies = fs::read_dir("/sys/fs/cgroup")?.map(|entry| Ok::<_, std::io::Error>(entry?.path()));
    for hierarchy in hierarchies.chain([Ok(PathBuf::from("/sys/fs/cgroup"))]) {
        match fs::remove_dir(Path::join(&hierarchy?, &group)) {
            Err(error) if !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                return Err(error.into());
            }
            _ => {}
        }
    }
    Ok(())
}

/// Docker puts a layer of its own between the image and each container.
fn containers_of_an_image_have_one_base_disk(docker: &Docker<'_>, runtime: &str) -> Result<()> {
    for _ in 0..3 {
        let seen = docker.ok(&["run", "--rm", "--runtime", runtime, IMAGE, "ls", "-a", "/"])?;
        ensure!(seen.lines().any(|name| name == ".dockerenv"), "{seen}");
    }
    let listed = docker.containerd().machinen(&["rootdisk", "ls", "--json"])?.run()?.ok()?.text();
    let listed: Vec<Value> = serde_json::from_str(&listed)?;
    let dir = docker.dir().display().to_string();
    let made =
        listed.iter().filter(|disk| disk["source"].as_str().is_some_and(|source| source.contains(&dir)));
    // None if another test has made the disk of this image.
    ensure!(made.clone().count() <= 1, "{:?}", made.collect::<Vec<_>>());
    Ok(())
}
