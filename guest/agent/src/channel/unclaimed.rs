//! Raw streams that the host has opened and no call has claimed yet, by token.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use machinen_protocol::MAX_UNCLAIMED_STREAMS;
use tokio::sync::Notify;

use super::Stream;

#[derive(Debug, Clone, Default)]
pub(crate) struct Unclaimed {
    slots: Arc<Mutex<HashMap<u64, Option<Stream>>>>,
    settled: Arc<Notify>,
}

/// A slot of the table for a stream whose greeting is not finished.
#[derive(Debug)]
pub(super) struct StreamSlot {
    unclaimed: Unclaimed,
    token: u64,
}

impl Unclaimed {
    /// Reserves a slot for a stream; None when the table is full or the token is in use.
    pub(super) fn reserve(&self, token: u64) -> Option<StreamSlot> {
        let mut slots = self.lock();
        if slots.len() >= MAX_UNCLAIMED_STREAMS || slots.contains_key(&token) {
            return None;
        }
        slots.insert(token, None);
        Some(StreamSlot { unclaimed: self.clone(), token })
    }

    /// Hands out a stream, once. The host may refer to a stream as soon as it has read the answer to the
    /// greeting, which may be before the agent has filed the stream: then this waits.
    pub(crate) async fn claim(&self, token: u64) -> Option<Stream> {
        loop {
            let settled = self.settled.notified();
            let filed = self.take(token)?;
            if filed.is_some() {
                return filed;
            }
            settled.await;
        }
    }

    /// None when the token is unknown, Some(None) when its stream is not filed yet.
    fn take(&self, token: u64) -> Option<Option<Stream>> {
        let mut slots = self.lock();
        let stream = slots.get_mut(&token)?.take();
        if stream.is_some() {
            slots.remove(&token);
        }
        Some(stream)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Option<Stream>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl StreamSlot {
    pub(super) fn fill(self, stream: Stream) {
        if let Some(slot) = self.unclaimed.lock().get_mut(&self.token) {
            *slot = Some(stream);
        }
        self.unclaimed.settled.notify_waiters();
    }
}

impl Drop for StreamSlot {
    /// Frees the slot of a stream that broke before it was filed.
    fn drop(&mut self) {
        let mut slots = self.unclaimed.lock();
        if slots.get(&self.token).is_some_and(Option::is_none) {
            slots.remove(&self.token);
        }
        drop(slots);
        self.unclaimed.settled.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_token_is_taken_once_and_freed_when_its_stream_breaks() {
        let unclaimed = Unclaimed::default();
        let place = unclaimed.reserve(7).unwrap();
        assert!(unclaimed.reserve(7).is_none());
        let mut claim = Box::pin(unclaimed.claim(7));
        assert!(futures_util::poll!(&mut claim).is_pending(), "still being greeted");
        drop(place);
        assert!(claim.await.is_none());
        assert!(unclaimed.claim(8).await.is_none(), "never opened");
        assert!(unclaimed.reserve(7).is_some());
    }

    #[test]
    fn the_table_is_bounded() {
        let unclaimed = Unclaimed::default();
        let places: Vec<_> =
            (1..=MAX_UNCLAIMED_STREAMS as u64).map(|t| unclaimed.reserve(t).unwrap()).collect();
        assert!(unclaimed.reserve(1000).is_none());
        drop(places);
        assert!(unclaimed.reserve(1000).is_some());
    }
}
