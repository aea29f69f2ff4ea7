//! What containers read and write, on the host: [`rootdisk`], the cache of ext4 disks made from image root file systems,
//! [`container_disk`], the disk that a container writes to, and [`layer`], which brings what a container has written
//! into its snapshot.
//!
//! Nothing here knows a VM or an event loop.

#![warn(missing_docs)]

pub mod container_disk;
pub mod layer;
pub mod rootdisk;
