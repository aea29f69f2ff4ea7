//! Traces by OTLP: a small receiver gets a span for each operation, and none of them waits for a receiver.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    sync::mpsc::{self, Receiver},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use machinen_integration::{
    containerd::Containerd,
    setup::{Setup, Value},
};
use serde_json::Value as Json;

use crate::harness::{IMAGE, NEWEST, run_with, works};

/// How long a span may take to arrive on a busy host.
const PATIENCE: Duration = Duration::from_secs(30);

/// Receives spans on a port of its own, until it is dropped with its process.
fn receiver(status: &'static str) -> Result<(String, Receiver<Json>)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let (sender, spans) = mpsc::channel();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            for span in request(stream, status).unwrap_or_default() {
                // The test has ended.
                let _ = sender.send(span);
            }
        }
    });
    Ok((format!("http://{address}"), spans))
}

/// Answers one request, and returns its spans.
fn request(stream: TcpStream, status: &str) -> Result<Vec<Json>> {
    let mut reader = BufReader::new(&stream);
    let (mut length, mut is_json) = (0, false);
    let mut first = String::new();
    reader.read_line(&mut first)?;
    ensure!(first == "POST /v1/traces HTTP/1.1\r\n", "{first}");
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        match line.trim_end().split_once(": ") {
            Some(("Content-Length", value)) => length = value.parse()?,
            Some(("Content-Type", value)) => is_json = value == "application/json",
            Some(_) => {}
            None => break,
        }
    }
    ensure!(is_json, "no JSON");
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    write!(&stream, "HTTP/1.1 {status}\r\nContent-Length: 2\r\n\r\n{{}}")?;
    let body: Json = serde_json::from_slice(&body)?;
    let spans = &body["resourceSpans"][0]["scopeSpans"][0]["spans"];
    Ok(spans.as_array().context("no spans")?.clone())
}

/// The spans until the operation of this name, whose phases follow it.
fn operation(spans: &Receiver<Json>, name: &str) -> Result<Json> {
    loop {
        let span = spans.recv_timeout(PATIENCE).with_context(|| format!("no span {name}"))?;
        if span["name"] == name {
            return Ok(span);
        }
    }
}

/// Waits for an operation that has failed for this reason.
fn failure(spans: &Receiver<Json>, reason: &str) -> Result<()> {
    loop {
        let span = spans.recv_timeout(PATIENCE).with_context(|| format!("no failure by {reason}"))?;
        if span["status"]["message"].as_str().is_some_and(|message| message.contains(reason)) {
            return Ok(());
        }
    }
}

/// The phase of an operation whose spans come next.
fn phase(spans: &Receiver<Json>, operation: &Json, name: &str) -> Result<Json> {
    loop {
        let span = spans.recv_timeout(PATIENCE).with_context(|| format!("no span {name}"))?;
        ensure!(span["parentSpanId"] == operation["spanId"], "{name} is not in {operation}: {span}");
        if span["name"] == name {
            ensure!(span["traceId"] == operation["traceId"], "another trace: {span}");
            let inside = |key: &str| -> Result<u64> { Ok(span[key].as_str().context("no time")?.parse()?) };
            ensure!(inside("startTimeUnixNano")? <= inside("endTimeUnixNano")?, "{span}");
            return Ok(span);
        }
    }
}

#[test]
fn operations_are_spans_with_their_phases() {
    let (base, spans) = receiver("200 OK").expect("a receiver");
    let setup = Setup::new().env("OTEL_EXPORTER_OTLP_ENDPOINT", base);
    run_with(NEWEST, &setup, |containerd| {
        let run = containerd.run(IMAGE, &["sleep", "1000"]).detached().flag("--null-io");
        let id = run.container().to_owned();
        run.ok()?;
        let create = operation(&spans, "create")?;
        ensure!(create["attributes"][0]["value"]["stringValue"] == id.as_str(), "{create}");
        ensure!(create["parentSpanId"] == "" && create["status"].is_null(), "{create}");
        for name in ["guest-create", "create"] {
            phase(&spans, &create, name)?;
        }
        operation(&spans, "start")?;
        let dir = tempfile::tempdir()?;
        let images = dir.path().join("images").display().to_string();
        containerd.ctr_ok(&["tasks", "checkpoint", "--image-path", &images, &id])?;
        let checkpoint = operation(&spans, "checkpoint")?;
        phase(&spans, &checkpoint, "save")?;
        containerd.end(&id)?;

        let refused = containerd.run(IMAGE, &["no-such-program"]).output()?;
        ensure!(refused.status != 0, "{refused}");
        failure(&spans, "no-such-program")
    });
}

/// A receiver that takes connections and never answers, one that refuses, and none at all.
#[test]
fn no_receiver_disturbs_a_container() {
    let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
    let silent = (format!("http://{}", silent.local_addr().expect("an address")), silent);
    let (refuses, _spans) = receiver("503 Service Unavailable").expect("a receiver");
    let setup = Setup::new().set("traces", "endpoint", Value::text(&format!("{}/v1/traces", silent.0)));
    run_with(NEWEST, &setup, |containerd| {
        works(containerd)?;
        for endpoint in [format!("{refuses}/v1/traces"), "http://127.0.0.1:1/".to_owned()] {
            containerd.configure(&Setup::new().set("traces", "endpoint", Value::text(&endpoint)))?;
            works(containerd)?;
        }
        refused_endpoint(containerd)
    });
}

fn refused_endpoint(containerd: &Containerd) -> Result<()> {
    containerd.configure(&Setup::new().set("traces", "endpoint", Value::text("https://collector:4318")))?;
    let output = containerd.run(IMAGE, &["true"]).output()?;
    let text = output.error_text();
    if output.status == 0 || !text.contains("traces.endpoint") || !text.contains("http://HOST:PORT/PATH") {
        bail!("{output}");
    }
    containerd.configure(&Setup::new())?;
    works(containerd)
}
