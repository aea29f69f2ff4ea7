//! The cache of ext4 disks made from image root file systems.
