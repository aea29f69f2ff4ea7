//! Images that are built in a VM, and what is left of builds that fail.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use machinen_integration::{image::Image, oci::Oci, process::Invocation};

use super::{image, json, on_a_host};

on_a_host!(
    of_a_containerfile,
    of_a_script,
    of_every_base,
    of_a_root_file_system,
    failures,
    interrupted,
    killed
);

/// Makes the context of a build, with a Containerfile on the image.
fn context(oci: &Oci, steps: &str) -> Result<String> {
    let dir = oci.file("context");
    fs::create_dir_all(dir.join("files/deep"))?;
    fs::write(dir.join("files/deep/f"), "deep\n")?;
    fs::write(dir.join("tool"), "#!/bin/sh\necho tool-$1\n")?;
    fs::set_permissions(dir.join("tool"), std::os::unix::fs::PermissionsExt::from_mode(0o4755))?;
    fs::write(dir.join("Containerfile"), format!("FROM {}\n{steps}", image(oci)))?;
    Ok(dir.display().to_string())
}

/// Nothing of a build is in the directory of its image.
fn no_rest(oci: &Oci) -> Result<()> {
    let dir = oci.file("x");
    let dir = dir.parent().context("it is in a directory")?;
    let rest: Vec<_> = fs::read_dir(dir)?.filter_map(|entry| Some(entry.ok()?.file_name())).collect();
    ensure!(!rest.iter().any(|name| name.to_string_lossy().starts_with(".machinen-")), "{rest:?}");
    Ok(())
}

fn of_a_containerfile(oci: &Oci) -> Result<()> {
    let context = context(
        oci,
        "ENV GREETING=\"hello there\" PATH=/opt:$PATH\n\
         RUN echo built by $(id -u) > /built; rm /bin/not-executable; ln /built /same; mkfifo /fifo\n\
         RUN mkdir -p /etc && echo web:x:33:44::/:/bin/sh >> /etc/passwd && mkdir /data && chown 33 /data\n\
         COPY tool /opt/\n\
         COPY files /data\n\
         WORKDIR /data/made\n\
         USER web\n\
         RUN id -u > /data/who; pwd > /data/where; [ -z \"$(ls -A)\" ]\n\
         ENTRYPOINT [\"/bin/sh\", \"-c\"]\n\
         CMD [\"tool $GREETING; id -un; pwd; cat /built /data/deep/f /data/who /data/where\"]\n",
    )?;
    let output = oci.file("built").display().to_string();
    let built = oci.output(&["image", "build", "--output", &output, "--tag", "built:1", &context])?.ok()?;
    ensure!(built.text().trim() == output, "{built}");
    ensure!(built.error_text().contains("step 2 of 11: ENV"), "{built}");
    no_rest(oci)?;
    let run = oci.output(&["boot", "--ref", "built:1", &output])?.ok()?;
    let expected = "tool-hello\nweb\n/data/made\nbuilt by 0\ndeep\n33\n/data/made\n";
    ensure!(run.text() == expected, "{run}");
    let script =
        "stat -c '%a %u' /opt/tool; ls /bin/not-executable; stat -c %h /same; test -p /fifo && echo fifo";
    let seen = oci.output(&["boot", "--user", "0", "--entrypoint", "/bin/sh", &output, "-c", script])?;
    ensure!(seen.text() == "4755 0\n2\nfifo\n" && seen.error_text().contains("not-executable"), "{seen}");
    of_the_new_image(oci, &output)
}

/// A layout is checked by its digests, so that it is unpacked shows that they are right.
fn of_the_new_image(oci: &Oci, base: &str) -> Result<()> {
    let archive = oci.file("second.tar").display().to_string();
    let script = oci.file("script");
    fs::write(&script, "rm -r /data/deep; mkdir /data/deep; echo new > /data/deep/n")?;
    let script = script.display().to_string();
    let args = ["image", "build", "--base", base, "--script", &script, "--output", &archive];
    // The base's user may not do that.
    oci.fails(&args, 1, "has failed with status 1")?;
    no_rest(oci)?;
    fs::write(&script, "rm -r /data/who; mkdir -p /data/more; id -u > /data/more/id")?;
    let args = [&args[..], &["--cmd", "[\"ls /data; cat /data/more/id\"]", "--env", "A=b=c"]].concat();
    oci.ok(&args)?;
    ensure!(Path::new(&archive).is_file());
    let run = oci.output(&["boot", &archive])?.ok()?;
    ensure!(run.text() == "deep\nmade\nmore\nwhere\n33\n", "{run}");
    oci.fails(&args, 1, "is there already")
}

fn of_a_script(oci: &Oci) -> Result<()> {
    let script = oci.file("script");
    fs::write(&script, "echo out; echo err >&2\nfalse | true\necho made > /made\n[ ! -t 0 ] && ! read x\n")?;
    let (script, output) = (script.display().to_string(), oci.file("out").display().to_string());
    let args = ["image", "build", "--base", &image(oci), "--script", &script, "--output", &output];
    let options = ["--cmd", "cat /made; echo $V", "--env", "V=1", "--workdir", "/tmp", "--scratch", "512M"];
    let built = oci.output(&[&args[..], &options].concat())?.ok()?;
    ensure!(built.text().trim() == output, "only the path is on stdout: {built}");
    ensure!(built.error_text().contains("out\nerr\n"), "{built}");
    let run = oci.output(&["boot", &output])?.ok()?;
    ensure!(run.text() == "made\n1\n", "{run}");
    let index = json(&fs::read_to_string(oci.file("out/index.json"))?)?;
    let digest = index["manifests"][0]["digest"].as_str().context("no manifest")?.replace("sha256:", "");
    let manifest = json(&fs::read_to_string(oci.file("out/blobs/sha256").join(digest))?)?;
    ensure!(manifest["layers"].as_array().is_some_and(|layers| layers.len() == 2), "{manifest}");
    Ok(())
}

fn of_every_base(oci: &Oci) -> Result<()> {
    let rootfs = oci.file("rootfs");
    Image::busybox()?.unpack(&rootfs)?;
    let tar = oci.file("rootfs.tar");
    Invocation::new("tar").arg("-C").arg(&rootfs).arg("-cf").arg(&tar).arg(".").run()?.ok()?;
    for (number, base) in [rootfs.clone(), tar].iter().enumerate() {
        let output = oci.file(&format!("of-{number}")).display().to_string();
        let args = ["image", "build", "--base", &base.display().to_string(), "--output", &output];
        let script = oci.file("s").display().to_string();
        fs::write(&script, "echo x > /written")?;
        oci.ok(&[&args[..], &["--script", &script, "--cmd", "cat /written"]].concat())?;
        ensure!(oci.output(&["boot", &output])?.ok()?.text() == "x\n");
    }
    ensure!(!rootfs.join("written").exists(), "the directory was changed");
    Ok(())
}

/// A tar without the layers' marks, of which the base's files are a part.
fn of_a_root_file_system(oci: &Oci) -> Result<()> {
    let context = context(
        oci,
        "RUN mkdir -p /d/e; echo old > /d/old; echo e > /d/e/old; echo k > /kept\n\
         RUN mkfifo /fifo; ln /kept /same; chown 7:8 /kept\n\
         CMD [\"lost\"]\n",
    )?;
    let (first, tar) = (oci.file("first"), oci.file("root.tar"));
    let (first, tar) = (first.display().to_string(), tar.display().to_string());
    oci.ok(&["image", "build", "--output", &first, &context])?;
    // A directory that hides another one, files that are removed, and one in the place of a directory.
    let script = oci.file("script");
    fs::write(
        &script,
        "rm -r /d /fifo; mkdir /d; echo new > /d/new; rm -r /etc; echo file > /etc; rm /same",
    )?;
    let script = script.display().to_string();
    let args =
        ["image", "build", "--base", &first, "--script", &script, "--format", "rootfs", "--env", "A=1"];
    let built = oci.output(&[&args[..], &["--output", &tar]].concat())?.ok()?;
    ensure!(built.error_text().contains("does not keep --env A"), "{built}");
    no_rest(oci)?;
    let listed = Invocation::new("tar").args(["-tvf", &tar, "--numeric-owner"]).run()?.ok()?.text();
    let line = |name: &str| listed.lines().find(|line| line.ends_with(name));
    let kept = line(" kept").context("no kept")?;
    ensure!(kept.contains("7/8") && line(" bin/busybox").is_some(), "{listed}");
    let removed = [" d/old", " d/e", " d/e/old", " fifo", " same"];
    ensure!(!listed.contains(".wh.") && removed.iter().all(|name| line(name).is_none()), "{listed}");
    let run =
        oci.output(&["boot", &tar, "sh", "-c", "cat /d/new /etc /kept; ls /d; stat -c %u /kept"])?.ok()?;
    ensure!(run.text() == "new\nfile\nk\nnew\n7\n", "{run}");
    oci.fails(&[&args[..], &["--output", &tar]].concat(), 1, "is there already")
}

/// SIGKILL, in the middle of a step. The container runs on until `gc` removes it.
fn killed(oci: &Oci) -> Result<()> {
    let context = context(oci, "RUN echo begun; sleep 1000\n")?;
    let script = format!(
        "cd {context}; \"$@\" < /dev/null > /dev/null 2> log & \
         until grep -q begun log; do sleep 0.1; done; kill -9 $!; wait $!; true"
    );
    let output = oci.file("new").display().to_string();
    oci.scripted(&script, &["image", "build", "--output", &output, &context])?.run()?.ok()?;
    let id = oci.ok(&["list", "--quiet"])?.trim().to_owned();
    ensure!(id.starts_with("build-"), "{id}");
    let unfinished = oci.file(&format!(".machinen-{id}"));
    ensure!(unfinished.exists(), "no {}", unfinished.display());
    let planned = oci.ok(&["gc", "--dry-run"])?;
    let named = format!("would remove {}", unfinished.display());
    ensure!(planned.contains(&named) && planned.contains(&format!("/state/{id}\n")), "{planned}");
    ensure!(oci.ok(&["list", "--quiet"])?.trim() == id && unfinished.exists(), "gc --dry-run has removed it");
    let removed = oci.ok(&["gc"])?;
    ensure!(removed.contains(&format!("removed {}", unfinished.display())), "{removed}");
    ensure!(oci.ok(&["list", "--quiet"])?.is_empty());
    no_rest(oci)?;
    ensure!(!oci.ok(&["gc"])?.contains("build"), "it was removed");
    Ok(())
}

fn failures(oci: &Oci) -> Result<()> {
    let output = oci.file("new").display().to_string();
    let build = |steps: &str, options: &[&str], text: &str| -> Result<()> {
        let context = context(oci, steps)?;
        let args = ["image", "build", "--output", &output];
        oci.fails(&[&args[..], options, &[context.as_str()]].concat(), 1, text)?;
        ensure!(!Path::new(&output).exists(), "an image is there after: {text}");
        no_rest(oci)
    };
    build("RUN echo x\nHEALTHCHECK none\n", &[], "line 3 of the build: HEALTHCHECK is not supported")?;
    build(
        "RUN true\nRUN echo why >&2; exit 7\n",
        &[],
        "line 3: RUN echo why >&2; exit 7 has failed with status 7",
    )?;
    build("RUN [\"/no/such\"]\n", &[], "/no/such")?;
    build("COPY none /x\n", &[], "line 2: COPY none /x: \"none\" is not in the context")?;
    build("COPY ../x /x\n", &[], "has the component ..")?;
    build("USER nobody-knows\n", &[], "line 2: USER nobody-knows: the image has no user")?;
    build("RUN sleep 1000\n", &["--timeout", "5s"], "has not ended within 5s")?;
    build("RUN dd if=/dev/zero of=/f bs=1M count=200\n", &["--scratch", "64M"], "has failed with status 1")?;
    // The step wrote a file whose name would remove another one in the layer.
    build("RUN touch /.wh.bin\n", &[], ".wh.bin")?;
    let nothing = oci.file("empty");
    fs::create_dir(&nothing)?;
    let nothing = nothing.display().to_string();
    oci.fails(&["image", "build", "--output", &output, &nothing], 1, "has no Containerfile")?;
    oci.fails(&["image", "build", "--output", "/no/such/dir/x", "--base", &image(oci)], 1, "/no/such/dir")?;
    oci.fails(&["image", "build", "--output", &output, "--base", "/no/such"], 1, "there is no image /no/such")
}

/// Ctrl-C, in the middle of a step.
fn interrupted(oci: &Oci) -> Result<()> {
    let context = context(oci, "RUN echo begun; sleep 1000\n")?;
    let output = oci.file("new").display().to_string();
    let script = "\"$@\" 2> log & until grep -q begun log; do sleep 0.1; done; kill -INT $!; wait $!; s=$?; cat log; exit $s";
    let script = format!("cd {context}; {script}");
    let built = oci.scripted(&script, &["image", "build", "--output", &output, &context])?.run()?;
    ensure!(built.status == 1 && built.text().contains("interrupted by SIGINT"), "{built}");
    ensure!(!Path::new(&output).exists());
    no_rest(oci)
}
