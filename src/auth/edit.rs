//! Changes a users file without disturbing what else a person wrote into it.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};

use super::users::{UsersFile, is_mosquitto};
use crate::config::problem::ConfigError;

/// A users file about to be changed.
#[derive(Debug)]
pub(crate) struct Editor {
    path: PathBuf,
    text: String,
    names: BTreeSet<String>,
}

/// Why a users file was not changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EditError {
    #[error("a user name is not empty and has no control characters and no `:`")]
    InvalidName,
    #[error("there is no user `{0}`")]
    NoSuchUser(String),
    /// Written in a way that this editor does not understand.
    #[error("the entry of `{0}` is written in a way that must be edited by hand")]
    ByHand(String),
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Unreadable(#[from] ConfigError),
}

impl Editor {
    /// A file that does not exist yet is an empty one.
    pub(crate) fn open(path: &Path) -> Result<Self, EditError> {
        // The file itself, not a link to it, is what gets replaced.
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        match fs::read_to_string(&path) {
            Ok(text) => Self::new(path, text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::new(path, String::new()),
            Err(source) => Err(EditError::Io { path, source }),
        }
    }

    fn new(path: PathBuf, text: String) -> Result<Self, EditError> {
        let names = UsersFile::parse(&path, text.clone())?
            .users
            .into_keys()
            .collect();
        Ok(Self { path, text, names })
    }

    /// Adds a user, or gives an old one a new password. Returns whether the user is new.
    pub(crate) fn set_password(&mut self, name: &str, hash: &str) -> Result<bool, EditError> {
        if name.is_empty() || name.contains(|c: char| c.is_control() || c == ':') {
            return Err(EditError::InvalidName);
        }
        let is_new = !self.names.contains(name);
        let text = if is_mosquitto(&self.text) {
            self.without_line(name) + &format!("{name}:{hash}\n")
        } else if is_new {
            self.with_table(name, hash)
        } else {
            self.with_password(name, hash)
                .ok_or_else(|| EditError::ByHand(name.to_owned()))?
        };
        let mut expected = self.names.clone();
        expected.insert(name.to_owned());
        self.replace(name, text, &expected)?;
        Ok(is_new)
    }

    pub(crate) fn remove(&mut self, name: &str) -> Result<(), EditError> {
        let mut expected = self.names.clone();
        if !expected.remove(name) {
            return Err(EditError::NoSuchUser(name.to_owned()));
        }
        let text = if is_mosquitto(&self.text) {
            self.without_line(name)
        } else {
            self.without_table(name)
        };
        self.replace(name, text, &expected)
    }

    /// Takes the changed text over if it says what it should.
    fn replace(
        &mut self,
        name: &str,
        text: String,
        expected: &BTreeSet<String>,
    ) -> Result<(), EditError> {
        match Self::new(self.path.clone(), text) {
            Ok(changed) if changed.names == *expected => *self = changed,
            _ => return Err(EditError::ByHand(name.to_owned())),
        }
        Ok(())
    }

    fn without_line(&self, name: &str) -> String {
        let is_other = |line: &&str| line.split_once(':').is_none_or(|(other, _)| other != name);
        let mut text: String = self.text.split_inclusive('\n').filter(is_other).collect();
        end_line(&mut text);
        text
    }

    fn with_table(&self, name: &str, hash: &str) -> String {
        let mut text = self.text.clone();
        end_line(&mut text);
        let gap = if text.is_empty() { "" } else { "\n" };
        text + &format!("{gap}[users.{}]\npassword = \"{hash}\"\n", key(name))
    }

    /// `None` if there is neither a password to replace nor a header to put one below.
    fn with_password(&self, name: &str, hash: &str) -> Option<String> {
        let table = DeTable::parse(&self.text).ok()?;
        let user = table.get_ref().get("users")?.get_ref().get(name)?;
        let (at, inserted) = match user.get_ref().get("password") {
            Some(password) => (password.span(), format!("\"{hash}\"")),
            None => {
                let header = self
                    .lines()
                    .find(|line| header(line.1).is_some_and(|path| path == ["users", name]))?;
                let end = header.0 + header.1.len();
                (end..end, format!("\npassword = \"{hash}\""))
            }
        };
        let mut text = self.text.clone();
        text.replace_range(at, &inserted);
        Some(text)
    }

    /// Without the tables of the user. Comments just above the next table belong to that.
    fn without_table(&self, name: &str) -> String {
        let mut kept: Vec<&str> = Vec::new();
        let mut doubtful: Vec<&str> = Vec::new();
        let mut is_removing = false;
        for (_, line) in self.lines() {
            if let Some(path) = header(line) {
                let was_removing = is_removing;
                is_removing = path.starts_with(&["users".to_owned(), name.to_owned()]);
                if was_removing && !is_removing {
                    kept.append(&mut doubtful);
                }
            }
            if !is_removing {
                kept.push(line);
            } else if line.trim_start().starts_with('#') {
                doubtful.push(line);
            } else {
                doubtful.clear();
            }
        }
        while kept.last().is_some_and(|line| line.trim().is_empty()) {
            kept.pop();
        }
        kept.iter().flat_map(|line| [line, "\n"]).collect()
    }

    /// Each line with the offset it begins at.
    fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        self.text.split_inclusive('\n').scan(0, |offset, line| {
            let start = *offset;
            *offset += line.len();
            Some((start, line.trim_end_matches(['\n', '\r'])))
        })
    }

    /// Replaces the file at once: a broker that reads it meanwhile sees the old or the new one.
    pub(crate) fn save(&self) -> Result<(), EditError> {
        replace_file(&self.path, &self.text)
    }
}

/// Replaces a file of secrets, or makes it: whoever reads it meanwhile sees the old or the new one.
pub(crate) fn replace_file(path: &Path, text: &str) -> Result<(), EditError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        |source| EditError::Io { path, source }
    };
    let mut temporary = path.to_owned().into_os_string();
    temporary.push(format!(".{}.tmp", std::process::id()));
    let temporary = PathBuf::from(temporary);
    let written = create_private(&temporary).and_then(|mut file| {
        keep_access(path, &file)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    });
    if let Err(source) = written {
        // Nothing is lost with it, and the first error is the one to report.
        let _ = fs::remove_file(&temporary);
        return Err(failed(&temporary)(source));
    }
    fs::rename(&temporary, path).map_err(failed(path))
}

fn end_line(text: &mut String) {
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
}

/// A TOML key, quoted where it must be.
fn key(name: &str) -> String {
    let is_bare = name
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
    if is_bare {
        name.to_owned()
    } else {
        serde_json::Value::from(name).to_string()
    }
}

/// The path that the line opens a table for, if it does.
fn header(line: &str) -> Option<Vec<String>> {
    if !line.trim_start().starts_with('[') {
        return None;
    }
    let table = DeTable::parse(line).ok()?;
    let mut path = Vec::new();
    let mut table = table.get_ref();
    while let Some((key, value)) = table.iter().next() {
        path.push(key.get_ref().to_string());
        match value.get_ref() {
            DeValue::Table(inner) => table = inner,
            _ => return None,
        }
    }
    Some(path)
}

/// Nobody else may read hashes.
fn create_private(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}

/// A broker that runs as another user than the administrator must be able to read on.
fn keep_access(old: &Path, new: &File) -> io::Result<()> {
    let Ok(metadata) = fs::metadata(old) else {
        return Ok(());
    };
    new.set_permissions(metadata.permissions())?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::{MetadataExt, fchown};
        if new.metadata()?.uid() != metadata.uid() || new.metadata()?.gid() != metadata.gid() {
            fchown(new, Some(metadata.uid()), Some(metadata.gid()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::password::tests::quick_hash;

    fn edit(text: &str) -> Editor {
        Editor::new("users.toml".into(), text.to_owned()).unwrap()
    }

    #[test]
    fn a_user_is_added_at_the_end() {
        let mut file = edit("# mine\n[users.ann]");
        let hash = quick_hash("secret");

        assert!(file.set_password("b o.b", &hash).unwrap());
        assert_eq!(
            file.text,
            format!("# mine\n[users.ann]\n\n[users.\"b o.b\"]\npassword = \"{hash}\"\n")
        );
    }

    #[test]
    fn a_new_password_replaces_the_old_one_and_nothing_else() {
        let (old, new) = (quick_hash("old"), quick_hash("new"));
        let text =
            format!("[users.ann]\npassword = '{old}' # secret\npublish = {{ deny = [\"x\"] }}\n");
        let mut file = edit(&text);

        assert!(!file.set_password("ann", &new).unwrap());
        assert_eq!(
            file.text,
            text.replace(&format!("'{old}'"), &format!("\"{new}\""))
        );
    }

    #[test]
    fn a_user_without_a_password_gets_one() {
        let hash = quick_hash("secret");
        let mut file = edit("[users.ann] # by certificate\npublish.deny = [\"x\"]\n");

        file.set_password("ann", &hash).unwrap();
        assert_eq!(
            file.text,
            format!(
                "[users.ann] # by certificate\npassword = \"{hash}\"\npublish.deny = [\"x\"]\n"
            )
        );
    }

    #[test]
    fn a_removed_user_leaves_the_comments_of_the_others() {
        let mut file = edit(
            "# all\n[users.ann]\n# ann's\npublish.deny = [\n  \"x\",\n]\n[users.ann.subscribe]\ndeny = []\n\n# bob\n[users.bob]\n",
        );

        file.remove("ann").unwrap();
        assert_eq!(file.text, "# all\n# bob\n[users.bob]\n");
        file.remove("bob").unwrap();
        assert!(matches!(file.remove("bob"), Err(EditError::NoSuchUser(_))));
    }

    #[test]
    fn what_cannot_be_edited_safely_is_left_alone() {
        let text = "[users]\nann = {}\nbob.publish.deny = []\n";
        let mut file = edit(text);

        assert!(matches!(file.remove("ann"), Err(EditError::ByHand(_))));
        assert!(matches!(
            file.set_password("ann", &quick_hash("x")),
            Err(EditError::ByHand(_))
        ));
        assert_eq!(file.text, text);
    }

    #[test]
    fn a_password_file_of_mosquitto_stays_one() {
        let (old, new) = (quick_hash("old"), quick_hash("new"));
        let mut file = edit(&format!("# mine\nann:{old}\nbob:{old}"));

        file.set_password("ann", &new).unwrap();
        assert_eq!(file.text, format!("# mine\nbob:{old}\nann:{new}\n"));
        file.remove("bob").unwrap();
        assert_eq!(file.text, format!("# mine\nann:{new}\n"));
    }

    #[test]
    fn names_that_a_file_cannot_hold_are_refused() {
        for name in ["", "a:b", "a\nb"] {
            let result = edit("").set_password(name, &quick_hash("x"));
            assert!(matches!(result, Err(EditError::InvalidName)), "{name:?}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_new_file_is_private_and_an_old_one_keeps_its_mode() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("users.toml");
        let mode = || fs::metadata(&path).unwrap().permissions().mode() & 0o777;

        let mut file = Editor::open(&path).unwrap();
        file.set_password("ann", &quick_hash("x")).unwrap();
        file.save().unwrap();
        assert_eq!(mode(), 0o600);

        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        Editor::open(&path).unwrap().save().unwrap();
        assert_eq!(mode(), 0o640);
        assert_eq!(
            fs::read_dir(folder.path()).unwrap().count(),
            1,
            "no temporary file is left"
        );
    }
}
