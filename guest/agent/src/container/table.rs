//! All containers of the VM, by id.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::Container;

/// A directory name may not be longer, and ids are directory names.
const MAX_ID: usize = 255;

#[derive(Debug, Clone, Default)]
pub(crate) struct Table {
    slots: Arc<Mutex<HashMap<String, Slot>>>,
}

#[derive(Debug)]
enum Slot {
    /// Being created or deleted: the id is taken, and nothing can be asked of it.
    Busy,
    Here(Arc<Container>),
}

/// The sole right to create or delete the container of one id.
#[derive(Debug)]
pub(crate) struct Reservation {
    table: Table,
    id: String,
    /// What the table holds again when the reservation is given up.
    otherwise: Option<Arc<Container>>,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TableError {
    #[error("container id {id:?} is not usable: 1 to {MAX_ID} of A-Z a-z 0-9 _ + - . and not only dots")]
    BadId { id: String },
    #[error("container {id} already exists")]
    Exists { id: String },
    #[error("container {id} does not exist")]
    Missing { id: String },
    #[error("container {id} is being created or deleted")]
    Busy { id: String },
}

impl Table {
    /// Takes an id for a new container.
    ///
    /// # Errors
    /// The id cannot be one, or is taken.
    pub(crate) fn reserve(&self, id: &str) -> Result<Reservation, TableError> {
        if !is_id(id) {
            return Err(TableError::BadId { id: id.chars().take(MAX_ID).collect() });
        }
        let mut slots = self.lock();
        if slots.contains_key(id) {
            return Err(TableError::Exists { id: id.to_owned() });
        }
        slots.insert(id.to_owned(), Slot::Busy);
        Ok(Reservation { table: self.clone(), id: id.to_owned(), otherwise: None })
    }

    /// Takes a container out, to delete it. None when there is none.
    ///
    /// # Errors
    /// Somebody else is at it.
    pub(crate) fn take(&self, id: &str) -> Result<Option<(Reservation, Arc<Container>)>, TableError> {
        let mut slots = self.lock();
        match slots.get(id) {
            None => Ok(None),
            Some(Slot::Busy) => Err(TableError::Busy { id: id.to_owned() }),
            Some(Slot::Here(container)) => {
                let container = Arc::clone(container);
                slots.insert(id.to_owned(), Slot::Busy);
                let otherwise = Some(Arc::clone(&container));
                Ok(Some((Reservation { table: self.clone(), id: id.to_owned(), otherwise }, container)))
            }
        }
    }

    /// # Errors
    /// There is none, or not quite.
    pub(crate) fn get(&self, id: &str) -> Result<Arc<Container>, TableError> {
        match self.lock().get(id) {
            Some(Slot::Here(container)) => Ok(Arc::clone(container)),
            Some(Slot::Busy) => Err(TableError::Busy { id: id.to_owned() }),
            None => Err(TableError::Missing { id: id.to_owned() }),
        }
    }

    pub(crate) fn all(&self) -> Vec<Arc<Container>> {
        let slots = self.lock();
        slots
            .values()
            .filter_map(|slot| match slot {
                Slot::Here(container) => Some(Arc::clone(container)),
                Slot::Busy => None,
            })
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reservation {
    /// The container is there now.
    pub(crate) fn fill(mut self, container: Container) {
        self.otherwise = Some(Arc::new(container));
    }

    /// The container is gone now.
    pub(crate) fn clear(mut self) {
        self.otherwise = None;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut slots = self.table.lock();
        match self.otherwise.take() {
            Some(container) => slots.insert(std::mem::take(&mut self.id), Slot::Here(container)),
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
        let table = Table::default();
        let reservation = table.reserve("a").unwrap();
        assert_eq!(table.reserve("a").unwrap_err(), TableError::Exists { id: "a".into() });
        assert_eq!(table.get("a").unwrap_err(), TableError::Busy { id: "a".into() });
        drop(reservation);
        assert_eq!(table.get("a").unwrap_err(), TableError::Missing { id: "a".into() });
        assert!(table.take("a").unwrap().is_none());
    }

    #[test]
    fn ids_that_mean_something_to_a_path_or_a_mount_are_refused() {
        for id in ["", ".", "..", "a/b", "a:b", "a,b", "a b", "a\0", "\u{e4}"] {
            assert!(matches!(Table::default().reserve(id), Err(TableError::BadId { .. })), "{id:?}");
        }
        assert!(Table::default().reserve(&"x".repeat(MAX_ID + 1)).is_err());
        assert!(Table::default().reserve("Az09_+-.").is_ok());
    }
}
