//! A table of things by id: all containers of the VM, and all added processes of a container.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use machinen_protocol::{
    error::{ErrorKind, HasKind},
    process::{MAX_ID, is_id},
};

#[derive(Debug)]
pub(crate) struct IdTable<T> {
    /// What the things are called in messages.
    what: &'static str,
    slots: Arc<Mutex<HashMap<String, Slot<T>>>>,
}

#[derive(Debug)]
enum Slot<T> {
    /// The thing is being created or deleted: its id is taken, and it cannot be used.
    Busy,
    Present(Arc<T>),
}

/// The exclusive right to create or delete the thing with one id.
#[derive(Debug)]
pub(crate) struct Reservation<T> {
    table: IdTable<T>,
    id: String,
    /// What the table holds after the reservation is dropped.
    on_drop: Option<Arc<T>>,
}

/// A thing that was taken out, and the reservation of its id.
type Taken<T> = (Reservation<T>, Arc<T>);

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum IdError {
    #[error("{what} id {id:?} is not usable: 1 to {MAX_ID} of A-Z a-z 0-9 _ + - . and not only dots")]
    BadId { what: &'static str, id: String },
    #[error("{what} {id} already exists")]
    Exists { what: &'static str, id: String },
    #[error("{what} {id} does not exist")]
    Missing { what: &'static str, id: String },
    #[error("{what} {id} is being created or deleted")]
    Busy { what: &'static str, id: String },
}

impl HasKind for IdError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::BadId { .. } => ErrorKind::InvalidArgument,
            Self::Exists { .. } => ErrorKind::AlreadyExists,
            Self::Missing { .. } => ErrorKind::NotFound,
            Self::Busy { .. } => ErrorKind::FailedPrecondition,
        }
    }
}

impl<T> Clone for IdTable<T> {
    fn clone(&self) -> Self {
        Self { what: self.what, slots: Arc::clone(&self.slots) }
    }
}

impl<T> IdTable<T> {
    pub(crate) fn new(what: &'static str) -> Self {
        Self { what, slots: Arc::default() }
    }

    /// Reserves an id for a new thing.
    ///
    /// # Errors
    /// The id is malformed, or in use.
    pub(crate) fn reserve(&self, id: &str) -> Result<Reservation<T>, IdError> {
        if !is_id(id) {
            return Err(IdError::BadId { what: self.what, id: id.chars().take(MAX_ID).collect() });
        }
        let mut slots = self.lock();
        if slots.contains_key(id) {
            return Err(IdError::Exists { what: self.what, id: id.to_owned() });
        }
        slots.insert(id.to_owned(), Slot::Busy);
        Ok(Reservation { table: self.clone(), id: id.to_owned(), on_drop: None })
    }

    /// Takes a thing out in order to delete it. None when the id is free.
    ///
    /// # Errors
    /// The thing is being created or deleted.
    pub(crate) fn take(&self, id: &str) -> Result<Option<Taken<T>>, IdError> {
        let mut slots = self.lock();
        match slots.get(id) {
            None => Ok(None),
            Some(Slot::Busy) => Err(IdError::Busy { what: self.what, id: id.to_owned() }),
            Some(Slot::Present(thing)) => {
                let thing = Arc::clone(thing);
                slots.insert(id.to_owned(), Slot::Busy);
                let on_drop = Some(Arc::clone(&thing));
                Ok(Some((Reservation { table: self.clone(), id: id.to_owned(), on_drop }, thing)))
            }
        }
    }

    /// Looks a thing up.
    ///
    /// # Errors
    /// The id is free, or the thing is being created or deleted.
    pub(crate) fn get(&self, id: &str) -> Result<Arc<T>, IdError> {
        match self.lock().get(id) {
            Some(Slot::Present(thing)) => Ok(Arc::clone(thing)),
            Some(Slot::Busy) => Err(IdError::Busy { what: self.what, id: id.to_owned() }),
            None => Err(IdError::Missing { what: self.what, id: id.to_owned() }),
        }
    }

    /// Whether no id is in use, also not by a thing that is being created or deleted.
    pub(crate) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    pub(crate) fn all(&self) -> Vec<Arc<T>> {
        self.entries().into_iter().map(|(_, thing)| thing).collect()
    }

    /// All things with their ids, without those that are being created or deleted.
    pub(crate) fn entries(&self) -> Vec<(String, Arc<T>)> {
        let slots = self.lock();
        slots
            .iter()
            .filter_map(|(id, slot)| match slot {
                Slot::Present(thing) => Some((id.clone(), Arc::clone(thing))),
                Slot::Busy => None,
            })
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Slot<T>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Reservation<T> {
    /// Puts the new thing into the table.
    pub(crate) fn fill(mut self, thing: T) {
        self.on_drop = Some(Arc::new(thing));
    }

    /// Frees the id of a thing that was deleted.
    pub(crate) fn clear(mut self) {
        self.on_drop = None;
    }
}

impl<T> Drop for Reservation<T> {
    fn drop(&mut self) {
        let mut slots = self.table.lock();
        match self.on_drop.take() {
            Some(thing) => slots.insert(std::mem::take(&mut self.id), Slot::Present(thing)),
            None => slots.remove(&self.id),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_taken_until_the_reservation_goes() {
        let table = IdTable::<()>::new("thing");
        let reservation = table.reserve("a").unwrap();
        assert_eq!(table.reserve("a").unwrap_err(), IdError::Exists { what: "thing", id: "a".into() });
        assert_eq!(table.get("a").unwrap_err(), IdError::Busy { what: "thing", id: "a".into() });
        drop(reservation);
        assert_eq!(table.get("a").unwrap_err(), IdError::Missing { what: "thing", id: "a".into() });
        assert!(table.take("a").unwrap().is_none());
    }

    #[test]
    fn a_malformed_id_is_refused() {
        assert!(matches!(IdTable::<()>::new("thing").reserve("a/b"), Err(IdError::BadId { .. })));
        assert!(IdTable::<()>::new("thing").reserve("Az09_+-.").is_ok());
    }
}
