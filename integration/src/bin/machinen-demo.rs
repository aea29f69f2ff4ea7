//! `make run`: one container in a microVM of its own, from nothing to its exit code, and the duration of each
//! step.
//!
//! Uses a private containerd, the freshly built shim and the user's own rootdisk cache, so that a second run
//! shows what the cache saves.

use std::{process::ExitCode, time::Instant};

use anyhow::{Context, Result};
use machinen_integration::{
    containerd::Containerd,
    image::Image,
    paths::{self, Version},
    phases,
    setup::Setup,
};

/// The container prints facts of its machine; 42 shows that the exit code is passed on.
const SCRIPT: &str = r#"
echo "kernel:   $(uname -a)"
echo "process:  pid $$, $(cat /proc/1/comm), in $(cut -d: -f3 /proc/1/cgroup | tail -1), $(ls -d /proc/[0-9]* | wc -l) visible"
echo "user:     $(id)"
echo "cpu:      $(grep -c ^processor /proc/cpuinfo) x $(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -1)"
echo "memory:   $(sed -n 's/^MemTotal: *//p' /proc/meminfo)"
echo "rootfs:   $(df -h / | tail -1 | tr -s ' ')"
echo "mounts:   $(awk '{ printf "%s%s(%s)", (NR > 1 ? " " : ""), $2, $3 }' /proc/mounts)"
exit 42
"#;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("machinen-demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let runtime = paths::runtime();
    println!("== a private containerd, an image made on the spot, runtime {runtime}");
    let start = Instant::now();
    let containerd = Containerd::start_with(Version::V1_6, &Setup::of_user())?;
    println!("   containerd serves on {} after {:.0?}", containerd.socket().display(), start.elapsed());
    // Templates of this run only, removed at its end.
    let templates = containerd.root().join("templates");
    containerd.configure(&Setup::of_user().templates(&templates, "use"))?;
    let start = Instant::now();
    let image = Image::busybox()?;
    containerd.import(&image)?;
    println!("   image {} imported in {:.0?}", image.name(), start.elapsed());

    println!("== ctr run --rm --runtime {runtime} {} demo sh -c ...", image.name());
    demonstrate(&containerd, image.name(), "demo")?;

    println!("== machinen template build");
    let start = Instant::now();
    let built = containerd.machinen(&["template", "build"])?.run()?.ok()?;
    print!("{}", built.error_text());
    println!("   template {} after {:.1?}", built.text().trim(), start.elapsed());

    println!("== the same container once more, in a clone of the template");
    demonstrate(&containerd, image.name(), "demo2")?;
    containerd.machinen(&["template", "rm", "--all"])?.run()?.ok()?;
    Ok(())
}

/// Runs the container, and prints its output, the duration of each step, and that nothing is left.
fn demonstrate(containerd: &Containerd, image: &str, id: &str) -> Result<()> {
    let before = containerd.inventory()?;
    let from = containerd.log().position();
    let run = containerd.run(image, &["sh", "-c", SCRIPT]).id(id);
    let output = run.output()?;
    print!("{}", output.text());
    eprint!("{}", output.error_text());
    println!("== exit code {}, {:.1?} in all", output.status, output.duration);
    let phases: Vec<_> =
        containerd.log().since(from).iter().filter_map(|line| phases::parse(line)).flatten().collect();
    for (name, millis) in &phases {
        println!("   {name:<32}{millis:>9.1} ms");
    }
    if phases.is_empty() {
        println!("   ({} does not log the phases of its start)", paths::runtime());
    }
    if output.status != 42 {
        eprintln!("{}", containerd.log());
        anyhow::bail!("the container should have ended with 42");
    }
    containerd.settle(&before).context("something is left of the container")?;
    println!("== nothing is left of it: no process, mount, file or control group");
    Ok(())
}
