//! The client's span, of which an operation is a part: W3C trace context, as containerd passes it on.

use std::future::Future;

tokio::task_local! {
    static PARENT: TraceParent;
}

/// A span of a client (W3C trace context, `traceparent`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceParent {
    pub(super) trace: u128,
    pub(super) span: u64,
    sampled: bool,
}

impl TraceParent {
    /// None: the text is no `traceparent` of the version 00.
    pub fn parse(text: &str) -> Option<Self> {
        let hex = |text: &str, length: usize| {
            text.len() == length && text.bytes().all(|byte| byte.is_ascii_hexdigit())
        };
        let mut parts = text.split('-');
        let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        if version != "00" || parts.next().is_some() || !hex(trace, 32) || !hex(span, 16) || !hex(flags, 2) {
            return None;
        }
        let trace = u128::from_str_radix(trace, 16).ok().filter(|&trace| trace != 0)?;
        let span = u64::from_str_radix(span, 16).ok().filter(|&span| span != 0)?;
        let flags = u8::from_str_radix(flags, 16).ok()?;
        Some(Self { trace, span, sampled: flags & 1 == 1 })
    }

    /// Whether the client records its span.
    pub(super) fn is_sampled(self) -> bool {
        self.sampled
    }
}

/// Runs `work` as a part of the client's span.
pub async fn within<T>(parent: Option<TraceParent>, work: impl Future<Output = T>) -> T {
    match parent {
        Some(parent) => PARENT.scope(parent, work).await,
        None => work.await,
    }
}

/// Gives `work`, which becomes a task of its own, the span that this task has.
pub fn inherit<T>(work: impl Future<Output = T>) -> impl Future<Output = T> {
    within(current(), work)
}

pub(super) fn current() -> Option<TraceParent> {
    PARENT.try_with(|parent| *parent).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_complete_parent_is_taken() {
        let parent = TraceParent::parse("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01").unwrap();
        assert_eq!(parent.trace, 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c);
        assert_eq!((parent.span, parent.is_sampled()), (0xb7ad_6b71_6920_3331, true));
        for odd in [
            "",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
            "01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0af7651916cd43dd8448eb211c80319+-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-x",
        ] {
            assert_eq!(TraceParent::parse(odd), None, "{odd}");
        }
    }

    #[tokio::test]
    async fn a_task_of_its_own_is_a_part_of_the_same_span() {
        let parent = TraceParent::parse("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
        let seen = within(parent, async {
            let task = tokio::spawn(inherit(async { current() }));
            task.await.unwrap()
        });
        assert_eq!(seen.await, parent);
        assert_eq!(current(), None);
    }
}
