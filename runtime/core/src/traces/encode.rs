//! Operations as OTLP's ExportTraceServiceRequest in JSON (opentelemetry-proto, docs/specification.md, OTLP/HTTP).

use std::{
    hash::{BuildHasher as _, RandomState},
    time::{SystemTime, UNIX_EPOCH},
};

use serde_json::{Value, json};

use super::{Operation, Phase};

/// SPAN_KIND_SERVER and SPAN_KIND_INTERNAL.
const SERVER: u8 = 2;
const INTERNAL: u8 = 1;
/// STATUS_CODE_ERROR.
const ERROR: u8 = 2;

/// Longest reason of a failure, bytes; errors quote what guests say.
const MOST_ERROR: usize = 1024;

pub(super) fn request(operations: &[Operation]) -> Vec<u8> {
    let spans: Vec<_> = operations.iter().flat_map(spans).collect();
    let version = env!("CARGO_PKG_VERSION");
    let request = json!({"resourceSpans": [{
        "resource": {"attributes": [text("service.name", "machinen"), text("service.version", version)]},
        "scopeSpans": [{"scope": {"name": "machinen", "version": version}, "spans": spans}],
    }]});
    request.to_string().into_bytes()
}

fn spans(operation: &Operation) -> Vec<Value> {
    let trace = match operation.parent {
        Some(parent) => parent.trace,
        None => u128::from(random()) << 64 | u128::from(random()),
    };
    let own = random();
    let phase =
        |phase: &Phase| span(trace, random(), Some(own), &phase.name, INTERNAL, phase.start, phase.end);
    let parent = operation.parent.map(|parent| parent.span);
    let mut root = span(trace, own, parent, operation.name, SERVER, operation.start, operation.end);
    root["attributes"] =
        json!([text("container.id", &operation.container), text("machinen.pod", &operation.pod)]);
    if let Some(error) = &operation.error {
        let end = error.floor_char_boundary(MOST_ERROR);
        root["status"] = json!({"code": ERROR, "message": &error[..end]});
    }
    [root].into_iter().chain(operation.phases.iter().map(phase)).collect()
}

fn span(
    trace: u128,
    id: u64,
    parent: Option<u64>,
    name: &str,
    kind: u8,
    start: SystemTime,
    end: SystemTime,
) -> Value {
    json!({
        "traceId": format!("{trace:032x}"),
        "spanId": format!("{id:016x}"),
        "parentSpanId": parent.map(|parent| format!("{parent:016x}")).unwrap_or_default(),
        "name": name,
        "kind": kind,
        "startTimeUnixNano": nanoseconds(start),
        "endTimeUnixNano": nanoseconds(end),
    })
}

fn text(key: &str, value: &str) -> Value {
    json!({"key": key, "value": {"stringValue": value}})
}

/// JSON has no integers of 64 bits, so OTLP writes them as text.
fn nanoseconds(time: SystemTime) -> String {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos()).to_string()
}

/// An id, which is not zero.
fn random() -> u64 {
    RandomState::new().hash_one(0).max(1)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::traces::TraceParent;

    #[test]
    fn an_operation_is_a_span_with_a_child_for_each_phase() {
        let start = UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let end = start + Duration::from_millis(5);
        let operation = Operation {
            name: "create",
            container: "c".to_owned(),
            pod: "p".to_owned(),
            parent: TraceParent::parse("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
            start,
            end,
            phases: vec![Phase { name: "vm".to_owned(), start, end }],
            error: Some("ü".repeat(MOST_ERROR)),
        };
        let request: Value = serde_json::from_slice(&request(&[operation])).unwrap();
        let [root, child] = &request["resourceSpans"][0]["scopeSpans"][0]["spans"].as_array().unwrap()[..]
        else {
            panic!("{request}")
        };
        for span in [root, child] {
            assert_eq!(span["traceId"], "0af7651916cd43dd8448eb211c80319c");
            assert_eq!(span["startTimeUnixNano"], "1700000000000000000");
            assert_eq!(span["endTimeUnixNano"], "1700000000005000000");
        }
        assert_eq!((&root["name"], &root["parentSpanId"]), (&json!("create"), &json!("b7ad6b7169203331")));
        assert_eq!((&child["name"], &child["parentSpanId"]), (&json!("vm"), &root["spanId"]));
        assert_eq!(root["attributes"][0], json!({"key": "container.id", "value": {"stringValue": "c"}}));
        assert_eq!(root["status"]["message"].as_str().unwrap().len(), MOST_ERROR);
    }
}
