//! What has an id: all containers of the VM, and all processes of a container beside its init.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// A directory name may not be longer, and ids are directory names.
const MAX_ID: usize = 255;

#[derive(Debug)]
pub(crate) struct Table<T> {
    /// What the things are, for messages.
    what: &'static str,
    slots: Arc<Mutex<HashMap<String, Slot<T>>>>,
}

#[derive(Debug)]
enum Slot<T> {
    /// Being created or deleted: the id is taken, and nothing can be asked of it.
    Busy,
    Here(Arc<T>),
}

/// The sole right to create or delete the thing of one id.
#[derive(Debug)]
pub(crate) struct Reservation<T> {
    table: Table<T>,
    id: String,
    /// What the table holds again when the reservation is given up.
    otherwise: Option<Arc<T>>,
}

/// What is taken out, and the right to put it back or not.
type Taken<T> = (Reservation<T>, Arc<T>);

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TableError {
    #[error("{what} id {id:?} is not usable: 1 to {MAX_ID} of A-Z a-z 0-9 _ + - . and not only dots")]
    BadId { what: &'static str, id: String },
    #[error("{what} {id} already exists")]
    Exists { what: &'static str, id: String },
    #[error("{what} {id} does not exist")]
    Missing { what: &'static str, id: String },
    #[error("{what} {id} is being created or deleted")]
    Busy { what: &'static str, id: String },
}

impl<T> Clone for Table<T> {
    fn clone(&self) -> Self {
        Self { what: self.what, slots: Arc::clone(&self.slots) }
    }
}

impl<T> Table<T> {
    pub(crate) fn new(what: &'static str) -> Self {
        Self { what, slots: Arc::default() }
    }

    /// Takes an id for a new one.
    ///
    /// # Errors
    /// The id cannot be one, or is taken.
    pub(crate) fn reserve(&self, id: &str) -> Result<Reservation<T>, TableError> {
        if !is_id(id) {
            return Err(TableError::BadId { what: self.what, id: id.chars().take(MAX_ID).collect() });
        }
        let mut slots = self.lock();
        if slots.contains_key(id) {
            return Err(TableError::Exists { what: self.what, id: id.to_owned() });
        }
        slots.insert(id.to_owned(), Slot::Busy);
        Ok(Reservation { table: self.clone(), id: id.to_owned(), otherwise: None })
    }

    /// Takes one out, to delete it. None when there is none.
    ///
    /// # Errors
    /// Somebody else is at it.
    pub(crate) fn take(&self, id: &str) -> Result<Option<Taken<T>>, TableError> {
        let mut slots = self.lock();
        match slots.get(id) {
            None => Ok(None),
            Some(Slot::Busy) => Err(TableError::Busy { what: self.what, id: id.to_owned() }),
            Some(Slot::Here(thing)) => {
                let thing = Arc::clone(thing);
                slots.insert(id.to_owned(), Slot::Busy);
                let otherwise = Some(Arc::clone(&thing));
                Ok(Some((Reservation { table: self.clone(), id: id.to_owned(), otherwise }, thing)))
            }
        }
    }

    /// # Errors
    /// There is none, or not quite.
    pub(crate) fn get(&self, id: &str) -> Result<Arc<T>, TableError> {
        match self.lock().get(id) {
            Some(Slot::Here(thing)) => Ok(Arc::clone(thing)),
            Some(Slot::Busy) => Err(TableError::Busy { what: self.what, id: id.to_owned() }),
            None => Err(TableError::Missing { what: self.what, id: id.to_owned() }),
        }
    }

    pub(crate) fn all(&self) -> Vec<Arc<T>> {
        self.entries().into_iter().map(|(_, thing)| thing).collect()
    }

    /// All that are there, with their ids.
    pub(crate) fn entries(&self) -> Vec<(String, Arc<T>)> {
        let slots = self.lock();
        slots
            .iter()
            .filter_map(|(id, slot)| match slot {
                Slot::Here(thing) => Some((id.clone(), Arc::clone(thing))),
                Slot::Busy => None,
            })
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Slot<T>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Reservation<T> {
    /// It is there now.
    pub(crate) fn fill(mut self, thing: T) {
        self.otherwise = Some(Arc::new(thing));
    }

    /// It is gone now.
    pub(crate) fn clear(mut self) {
        self.otherwise = None;
    }
}

impl<T> Drop for Reservation<T> {
    fn drop(&mut self) {
        let mut slots = self.table.lock();
        match self.otherwise.take() {
            Some(thing) => slots.insert(std::mem::take(&mut self.id), Slot::Here(thing)),
            None => slots.remove(&self.id),
        };
    }
}

fn is_id(id: &str) -> bool {
    (1..=MAX_ID).contains(&id.len())
        && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_+-.".contains(&byte))
        && !id.bytes().all(|byte| byte == b'.')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_taken_until_the_reservation_goes() {
        let table = Table::<()>::new("thing");
        let reservation = table.reserve("a").unwrap();
        assert_eq!(table.reserve("a").unwrap_err(), TableError::Exists { what: "thing", id: "a".into() });
        assert_eq!(table.get("a").unwrap_err(), TableError::Busy { what: "thing", id: "a".into() });
        drop(reservation);
        assert_eq!(table.get("a").unwrap_err(), TableError::Missing { what: "thing", id: "a".into() });
        assert!(table.take("a").unwrap().is_none());
    }

    #[test]
    fn ids_that_mean_something_to_a_path_or_a_mount_are_refused() {
        for id in ["", ".", "..", "a/b", "a:b", "a,b", "a b", "a\0", "\u{e4}"] {
            assert!(matches!(Table::<()>::new("thing").reserve(id), Err(TableError::BadId { .. })), "{id:?}");
        }
        assert!(Table::<()>::new("thing").reserve(&"x".repeat(MAX_ID + 1)).is_err());
        assert!(Table::<()>::new("thing").reserve("Az09_+-.").is_ok());
    }
}
