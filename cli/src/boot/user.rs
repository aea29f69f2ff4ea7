//! Which user and groups an image or an option names (passwd(5), group(5)).

use std::path::Path;

use super::BootError;
use crate::image::read_in_root;

/// The user of a process.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct ProcessUser {
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) further_gids: Vec<u32>,
    pub(super) home: Option<String>,
}

/// Most groups of a user that are looked at.
const MAX_GROUPS: usize = 256;

/// Reads `USER[:GROUP]`, names or numbers, with the files of the root file system at `root`.
///
/// # Errors
/// A name is not in these files, or they cannot be read.
pub(super) fn find(root: &Path, text: &str) -> Result<ProcessUser, BootError> {
    let file = |path: &'static str| {
        let text = read_in_root(root, path.trim_start_matches('/').as_ref());
        let text = text.map_err(|source| BootError::UserFile { file: path, source })?;
        Ok::<_, BootError>(String::from_utf8_lossy(&text.unwrap_or_default()).into_owned())
    };
    read(text, &file("/etc/passwd")?, &file("/etc/group")?)
}

/// Reads `USER[:GROUP]` with the contents of /etc/passwd and /etc/group.
///
/// # Errors
/// A name is not in them.
pub(crate) fn read(text: &str, passwd: &str, group: &str) -> Result<ProcessUser, BootError> {
    let (user, group_name) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (text, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let number = user.parse::<u32>().ok();
    let known = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|fields| {
        fields.first() == Some(&user)
            || (number.is_some() && fields.get(2).and_then(|uid| uid.parse().ok()) == number)
    });
    let field = |at: usize| known.as_ref().and_then(|fields| fields.get(at).copied());
    let uid = number
        .or_else(|| field(2)?.parse().ok())
        .ok_or_else(|| BootError::NoUser { user: user.to_owned() })?;
    let groups: Vec<Vec<&str>> = group.lines().map(|line| line.split(':').collect()).collect();
    let gid = match group_name {
        None => field(3).and_then(|gid| gid.parse().ok()).unwrap_or(0),
        Some(name) => {
            let by_name = || groups.iter().find(|fields| fields.first() == Some(&name))?.get(2)?.parse().ok();
            let missing = || BootError::NoGroup { group: name.to_owned() };
            name.parse().ok().or_else(by_name).ok_or_else(missing)?
        }
    };
    let is_member = |fields: &&Vec<&str>| {
        let members = fields.get(3).copied().unwrap_or_default();
        // With a group of its own a process has no others, as with docker.
        group_name.is_none() && field(0).is_some_and(|name| members.split(',').any(|member| member == name))
    };
    let further = groups.iter().filter(is_member).filter_map(|fields| fields.get(2)?.parse().ok());
    let further_gids = further.filter(|further| *further != gid).take(MAX_GROUPS).collect();
    Ok(ProcessUser { uid, gid, further_gids, home: field(5).map(str::to_owned) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_and_groups_have_names_and_numbers() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:44::/srv:/bin/false\nodd\n";
        let group = "root:x:0:\nweb:x:44:\nlog:x:5:other,web\n";
        let user = |text| read(text, passwd, group).map(|user| (user.uid, user.gid, user.further_gids));
        assert_eq!(user("").unwrap(), (0, 0, vec![]));
        assert_eq!(user("web").unwrap(), (33, 44, vec![5]));
        assert_eq!(user("33").unwrap(), (33, 44, vec![5]));
        assert_eq!(user("web:log").unwrap(), (33, 5, vec![]));
        assert_eq!(user("1000:7").unwrap(), (1000, 7, vec![]));
        assert_eq!(read("web", passwd, group).unwrap().home.as_deref(), Some("/srv"));
        assert!(matches!(user("none"), Err(BootError::NoUser { .. })));
        assert!(matches!(user("web:none"), Err(BootError::NoGroup { .. })));
        assert!(matches!(user("-1"), Err(BootError::NoUser { .. })));
    }
}
