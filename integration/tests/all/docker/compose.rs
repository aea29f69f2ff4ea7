//! A file of Compose with three services, a volume, a healthcheck and dependencies.

use std::{fs, time::Duration};

use anyhow::{Result, ensure};
use machinen_integration::docker::Docker;

use super::with_docker;
use crate::harness::IMAGE;

with_docker!(runc, RUNC: three_services);
with_docker!(machinen, MACHINEN: three_services);

/// `store` writes to the volume and listens, `front` serves what it gets from `store`, and `check` uses `front`.
fn file(runtime: &str) -> String {
    format!(
        r#"
services:
  store:
    image: {IMAGE}
    runtime: {runtime}
    command: ["sh", "-c", "echo stored > /data/file; exec nc -ll -p 70 -e cat /data/file"]
    volumes: ["data:/data"]
    healthcheck:
      test: ["CMD", "test", "-s", "/data/file"]
      interval: 1s
      timeout: 30s
      retries: 60
    networks: [inner]
  front:
    image: {IMAGE}
    runtime: {runtime}
    environment: {{ BACKEND: store }}
    command: ["sh", "-c", "exec nc -ll -p 80 -e sh /front"]
    configs: [{{ source: script, target: /front }}]
    depends_on: {{ store: {{ condition: service_healthy }} }}
    ports: ["127.0.0.1:8080:80"]
    networks: [inner]
  check:
    image: {IMAGE}
    runtime: {runtime}
    command: ["sh", "-c", "until nslookup front > /dev/null; do sleep 0.2; done; echo checked"]
    depends_on: [front]
    networks: [inner]
configs:
  script:
    file: ./front.sh
volumes:
  data: {{}}
networks:
  inner: {{}}
"#
    )
}

/// Asks `store`, by its name.
const FRONT: &str =
    "address=$(nslookup $BACKEND | sed -n '/^Name/,$ s/^Address.*: *\\([0-9.]*[0-9]\\).*/\\1/p')
echo front got $(nc $address 70 < /dev/null)
";

fn three_services(docker: &Docker<'_>, runtime: &str) -> Result<()> {
    let dir = docker.dir().join("project");
    fs::create_dir(&dir)?;
    fs::write(dir.join("compose.yaml"), file(runtime))?;
    fs::write(dir.join("front.sh"), FRONT)?;
    let compose = |args: &[&str]| -> Result<String> {
        let compose = docker.docker(&["compose"])?.args(args.iter().copied()).current_dir(&dir);
        Ok(compose.deadline(Duration::from_secs(240)).run()?.ok()?.text())
    };
    compose(&["up", "--detach"])?;
    let client = "until busybox nc 127.0.0.1 8080 < /dev/null | grep stored; do sleep 0.2; done";
    let output =
        docker.in_daemons_network(&["sh", "-c", client]).deadline(Duration::from_secs(120)).run()?.ok()?;
    ensure!(output.text() == "front got stored\n", "{output}");
    ensure!(docker.ok(&["wait", "project-check-1"])? == "0");
    let logs = docker.ok(&["logs", "project-check-1"])?;
    ensure!(logs == "checked", "{logs}");
    let states = compose(&["ps", "--all", "--format", "{{.Service}} {{.State}} {{.Health}}"])?;
    let mut states: Vec<_> = states.lines().map(str::trim_end).collect();
    states.sort_unstable();
    ensure!(states == ["check exited", "front running", "store running healthy"], "{states:?}");
    compose(&["exec", "-T", "store", "sh", "-c", "echo changed > /data/file"])?;
    // A restarted container has its volume, and the others find it by its name.
    compose(&["restart", "--timeout", "1", "front"])?;
    let client = "until busybox nc 127.0.0.1 8080 < /dev/null | grep changed; do sleep 0.2; done";
    docker.in_daemons_network(&["sh", "-c", client]).deadline(Duration::from_secs(120)).run()?.ok()?;
    compose(&["down", "--volumes", "--timeout", "1"])?;
    Ok(fs::remove_dir_all(&dir)?)
}
