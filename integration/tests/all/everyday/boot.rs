//! A container from an image in a file, and what is left of it.

use std::fs;

use anyhow::{Result, ensure};
use machinen_integration::{image::Image, oci::Oci, process::Invocation, terminal::Terminal};
use serde_json::Value;

use super::{background, boot, booting, image, json, on_a_host};

on_a_host!(
    to_its_end,
    images_in_every_form,
    wrong_input,
    in_the_background,
    attached,
    deleted_at_its_end,
    two_at_once,
    published,
    collected,
);

fn to_its_end(oci: &Oci) -> Result<()> {
    let shared = oci.file("shared");
    fs::create_dir(&shared)?;
    let volume = format!("{}:/shared", shared.display());
    let options =
        ["--env", "A=1", "--workdir", "/tmp", "--memory", "256m", "--cpus", "1", "--volume", &volume];
    let script =
        "echo $A $(pwd) $(hostname); cat; echo err >&2; echo kept > /shared/f; echo x > /written; exit 7";
    let named = [&options[..], &["--name", "b"]].concat();
    let mut running = booting(oci, &named, script)?.with_stdin().spawn()?;
    std::io::Write::write_all(&mut running.stdin().expect("it has a stdin"), b"typed\n")?;
    let output = running.wait()?;
    ensure!(output.status == 7 && output.text() == "1 /tmp b\ntyped\n", "{output}");
    ensure!(output.error_text().ends_with("err\n"), "{output}");
    ensure!(fs::read_to_string(shared.join("f"))? == "kept\n");
    // What it has written is gone, and so is its name.
    let again = boot(oci, &["--name", "b"], "ls /written; id -u")?;
    ensure!(again.status == 0 && again.text() == "0\n", "{again}");
    ensure!(!again.error_text().contains("unpacking"), "unpacked again: {again}");
    let user = boot(oci, &["--user", "7:8", "--entrypoint", "/bin/busybox", "--read-only"], "id")?;
    // The entry point gets the words of the command.
    ensure!(user.status == 0, "{user}");
    Ok(())
}

fn images_in_every_form(oci: &Oci) -> Result<()> {
    let rootfs = oci.file("rootfs");
    Image::busybox()?.unpack(&rootfs)?;
    let (tar, packed) = (oci.file("rootfs.tar"), oci.file("image.tar.gz"));
    Invocation::new("tar").arg("-C").arg(&rootfs).arg("-cf").arg(&tar).arg(".").run()?.ok()?;
    fs::write(&packed, Invocation::new("gzip").arg("-c").arg(image(oci)).run()?.ok()?.stdout)?;
    for form in [&rootfs, &tar, &packed] {
        let form = form.display().to_string();
        let output = oci.output(&["boot", &form, "sh", "-c", "echo $(uname -s); echo x > /written"])?;
        ensure!(output.status == 0 && output.text() == "Linux\n", "{form}: {output}");
    }
    ensure!(!rootfs.join("written").exists(), "the directory was changed");
    Ok(())
}

fn wrong_input(oci: &Oci) -> Result<()> {
    let text = oci.file("text");
    fs::write(&text, "no archive ".repeat(200))?;
    let (text, archive) = (text.display().to_string(), image(oci));
    for (args, wanted) in [
        (&["boot", "/no/such/image", "true"][..], "there is no image /no/such/image"),
        (&["boot", &text, "true"], "is neither a tar archive"),
        (&["boot", "--ref", "other", &archive, "true"], "there is no image \"other\""),
        (&["boot", "--volume", "/no/such:/x", &archive, "true"], "--volume"),
        (&["boot", "--memory", "much", &archive, "true"], "--memory"),
        (&["boot", "--user", "nobody-knows", &archive, "true"], "no user \"nobody-knows\""),
        (&["boot", "--name", "a/b", &archive, "true"], "a/b"),
        (&["boot", &archive, "/no/such/program"], "/no/such/program"),
        (&["boot", "--cpus", "0", &archive, "true"], "--cpus"),
    ] {
        oci.fails(args, 125, wanted)?;
    }
    let output = oci.command_with(&["--log-format", "json"], &["boot", "/no/such/image"])?.run()?;
    let line = json(output.error_text().trim())?;
    ensure!(line["code"] == "not-found" && line["retryable"] == false, "{line}");
    for verb in ["top", "console", "logs", "attach"] {
        oci.fails(&[verb, "none"], 1, "there is no container \"none\"")?;
    }
    oci.fails(&["cp", "none:/x", "/tmp"], 1, "there is no container \"none\"")?;
    oci.fails(&["cp", "/x", "/tmp"], 1, "neither SRC nor DST")
}

/// Ports of the host. It has no network but what the test gives it.
fn published(oci: &Oci) -> Result<()> {
    let host = |script: &str| oci.scripted(script, &["list"])?.run()?.ok();
    host(
        "ip link add out0 type veth peer name out1; ip link set out0 up; ip link set out1 up; \
          ip addr add 192.168.77.1/24 dev out0; ip route add default via 192.168.77.2",
    )?;
    background(oci, "web", &["--publish", "8080:80"], "nc -ll -p 80 -e echo served & true")?;
    let served = host("until busybox nc 127.0.0.1 8080 < /dev/null | grep served; do sleep 0.1; done")?;
    ensure!(served.text().starts_with("served\n"), "{served}");
    ensure!(oci.ok(&["port", "web"])? == "80/tcp -> 127.0.0.1:8080\n");
    ensure!(oci.ok(&["port", "web", "80"])? == "127.0.0.1:8080\n");
    let listed = json(&oci.ok(&["port", "--format", "json", "web"])?)?;
    let wanted = [("containerPort", 80.into()), ("protocol", "tcp".into()), ("hostPort", 8080.into())];
    ensure!(wanted.iter().all(|(key, value): &(&str, Value)| listed[0][key] == *value), "{listed}");
    oci.fails(&["port", "web", "81"], 1, "does not publish its port 81")?;
    let archive = image(oci);
    oci.fails(
        &["boot", "-p", "8080:80", &archive, "true"],
        125,
        "cannot publish the port 127.0.0.1:8080:80",
    )?;
    oci.fails(&["boot", "-p", "8080", &archive, "true"], 125, "--publish")?;
    let outside = boot(oci, &["--network", "pasta"], "ip -4 -o addr show dev eth0; cat /etc/resolv.conf")?;
    let text = outside.text();
    ensure!(text.contains("10.0.2.100/24") && text.contains("nameserver 10.0.2.3"), "{outside}");
    let checked = oci.output(&["check"])?.text();
    ensure!(checked.contains("pasta publishes ports"), "{checked}");
    oci.output(&["delete", "--force", "web"])?.ok()?;
    host("ip link delete out0").map(drop)
}

fn in_the_background(oci: &Oci) -> Result<()> {
    background(oci, "d", &[], "echo out; echo err >&2; printf part; sleep 0.1; echo ed")?;
    oci.fails(&["boot", "--name", "d", &image(oci), "true"], 125, "already exists")?;
    let output = oci.output(&["logs", "d"])?.ok()?;
    ensure!(output.text() == "out\nparted\nready\n" && output.error_text() == "err\n", "{output}");
    ensure!(oci.ok(&["logs", "--tail", "1", "d"])? == "ready\n");
    let timed = oci.ok(&["logs", "--timestamps", "--tail", "1", "d"])?;
    ensure!(timed.contains("Z ready"), "{timed}");
    // --follow ends with the container.
    let mut following = oci.command(&["logs", "--follow", "d"])?.spawn()?;
    following.wait_for_stdout("ready\n")?;
    oci.ok(&["kill", "d", "KILL"])?;
    ensure!(following.wait_for_exit()? == 0, "{:?}", following.written());
    // It is kept with its log until it is deleted.
    oci.has_status("d", "stopped")?;
    ensure!(oci.ok(&["logs", "d"])?.contains("ready"));
    oci.fails(&["attach", "d"], 1, "has ended")?;
    oci.ok(&["delete", "d"]).map(drop)
}

fn attached(oci: &Oci) -> Result<()> {
    boot(
        oci,
        &["--detach", "--tty", "--name", "t"],
        "echo begun; while read line; do echo got-$line; [ $line = end ] && exit 5; done",
    )?
    .ok()?;
    let attach = oci.command(&["attach", "t"])?;
    let mut terminal = Terminal::run(&attach, 70, 20)?;
    terminal.expect("begun")?;
    terminal.type_in("one\r")?;
    terminal.expect("got-one")?;
    terminal.type_in("\x10\x11")?;
    let (status, text) = terminal.wait()?;
    ensure!(status == 0 && text.contains("detached"), "{status}: {text}");
    oci.has_status("t", "running")?;
    let mut terminal = Terminal::run(&attach, 90, 30)?;
    // What was printed before is shown again.
    terminal.expect("got-one")?;
    terminal.type_in("end\r")?;
    let (status, text) = terminal.wait()?;
    ensure!(status == 5, "{status}: {text}");
    oci.ok(&["delete", "t"])?;
    // Not every container has its streams kept.
    oci.bundle("plain", &["sleep", "1000"], |_| {})?;
    let _plain = oci.launch("plain")?;
    oci.fails(&["attach", "plain"], 1, "was not started by `machinen boot --detach`")?;
    oci.fails(&["logs", "plain"], 1, "has no log")?;
    oci.ok(&["delete", "--force", "plain"]).map(drop)
}

fn deleted_at_its_end(oci: &Oci) -> Result<()> {
    boot(oci, &["--detach", "--rm", "--interactive", "--name", "r"], "read line; echo got-$line")?.ok()?;
    let mut attached = oci.command(&["attach", "r"])?.with_stdin().spawn()?;
    std::io::Write::write_all(&mut attached.stdin().expect("it has a stdin"), b"x\n")?;
    let output = attached.wait()?;
    ensure!(output.status == 0 && output.text().contains("got-x"), "{output}");
    let gone = "until ! \"$@\" > /dev/null 2>&1; do sleep 0.1; done";
    oci.scripted(gone, &["state", "r"])?.run()?.ok().map(drop)
}

/// Both unpack the same image, and one of them waits for the other.
fn two_at_once(oci: &Oci) -> Result<()> {
    let mut both = [booting(oci, &[], "echo one")?.spawn()?, booting(oci, &[], "echo two")?.spawn()?];
    for (running, text) in both.iter_mut().zip(["one\n", "two\n"]) {
        ensure!(running.wait_for_exit()? == 0, "{:?}", running.written());
        ensure!(running.written()[0] == text, "{:?}", running.written());
    }
    Ok(())
}

fn collected(oci: &Oci) -> Result<()> {
    boot(oci, &[], "true")?.ok()?;
    background(oci, "k", &[], ":")?;
    let collect = |options: &[&str]| -> Result<Value> {
        json(&oci.ok(&[&["gc", "--json", "--unused-for", "0s"], options].concat())?)
    };
    let images = |value: &Value| {
        value["removed"].as_array().map_or(0, |all| {
            all.iter().filter(|path| path.as_str().is_some_and(|path| path.contains("/images/"))).count()
        })
    };
    // Never anything that a container uses.
    ensure!(images(&collect(&["--dry-run"])?) == 0);
    oci.has_status("k", "running")?;
    oci.ok(&["delete", "--force", "k"])?;
    ensure!(images(&collect(&["--dry-run"])?) == 1);
    Ok(())
}
