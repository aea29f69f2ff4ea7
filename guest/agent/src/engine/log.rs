//! libcontainer reports the details of a failure only through `tracing`. This sends its errors through the
//! report pipe, from every process in which they occur.

use std::fmt::{self, Write};

use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    span,
};

use super::report::{Report, Reporter};

#[derive(Debug)]
pub(super) struct ErrorLog {
    reporter: Reporter,
}

/// Installs the subscriber in this process and its forks.
pub(super) fn install(reporter: Reporter) {
    // This cannot fail: the zygote, from which workers are forked, installs no subscriber.
    let _ = tracing::subscriber::set_global_default(ErrorLog { reporter });
}

impl Subscriber for ErrorLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == Level::ERROR
    }

    fn max_level_hint(&self) -> Option<tracing::level_filters::LevelFilter> {
        Some(tracing::level_filters::LevelFilter::ERROR)
    }

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        self.reporter.send(Report::Log { text: format!("{}{}", line.message, line.fields) });
    }

    // Spans carry nothing that an error needs.
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a String does not fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, ", {name}: {value:?}"),
        };
    }
}
