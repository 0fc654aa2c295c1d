//! Output folders that appear complete or not at all, as [`crate::atomic_file`] has it for files.
//!
//! The files are written into a temporary folder beside the output, each forced to disk and read back on its own. Then
//! the folder gets its name in one step; an old folder under that name changes places with it and is removed.

use crate::atomic_file::{AtomicFile, create_temp, output_exists, rename_new, sync_folder};
use crate::{Error, ErrorKind, Result};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use std::io::ErrorKind as IoKind;
use std::path::{Path, PathBuf};

/// A file without which no folder is replaced: `--force` on a home folder must not remove it.
const MARK: &str = "config.json";

/// A folder being written under a temporary name. Dropped without [`AtomicFolder::commit`], it is removed.
#[derive(Debug)]
pub struct AtomicFolder {
    temp: PathBuf,
    target: PathBuf,
    replaces: bool,
}

impl AtomicFolder {
    /// Creates `.NAME.kestrel-partial-PID` beside `target`.
    ///
    /// Errors: `OutputExists` if the target exists and `force` is false, `Usage` if it is something else than a model
    /// folder, `Io`.
    pub fn create(target: &Path, force: bool) -> Result<Self> {
        let (target, replaces) = check_target_folder(target, force)?;
        let (_, temp) = create_temp(&target, |temp| std::fs::create_dir(temp))?;
        Ok(Self { temp, target, replaces })
    }

    /// A file in the folder; it is committed like any other.
    pub fn file(&self, name: &str, file_bytes: u64) -> Result<AtomicFile> {
        AtomicFile::create(&self.temp.join(name), file_bytes, false)
    }

    /// Forces the folder to disk, lets `check` look at it under its temporary name, and only then gives it its own.
    pub fn commit(self, check: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        sync_folder(&self.temp.join(MARK))?;
        check(&self.temp)?;
        if self.replaces {
            // What was there is now under the temporary name, and goes when this is dropped.
            renameat_with(CWD, &self.temp, CWD, &self.target, RenameFlags::EXCHANGE).map_err(|e| {
                Error::io(&self.target, "replacing the folder", e)
                    .hint("this file system cannot exchange two folders; remove the old one first")
            })?;
        } else {
            rename_new(&self.temp, &self.target).map_err(|e| match e.kind() {
                IoKind::AlreadyExists => output_exists(&self.target),
                _ => Error::io(&self.target, "giving the output its name", e),
            })?;
        }
        sync_folder(&self.target)
    }
}

impl Drop for AtomicFolder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.temp);
    }
}

/// Refuses, before any work, an output folder that [`AtomicFolder::create`] would refuse; returns its path and whether
/// there is a folder to replace.
pub fn check_target_folder(target: &Path, force: bool) -> Result<(PathBuf, bool)> {
    if target.file_name().is_none() {
        return Err(Error::new(ErrorKind::Usage).file(target).what("output").expected("a folder name"));
    }
    match std::fs::symlink_metadata(target) {
        Err(e) if e.kind() == IoKind::NotFound => return Ok((target.to_owned(), false)),
        Err(e) => return Err(Error::io(target, "looking at the output", e)),
        Ok(_) if !force => return Err(output_exists(target)),
        Ok(_) => {}
    }
    let real = std::fs::canonicalize(target).map_err(|e| Error::io(target, "following the path", e))?;
    let not_a_model = |found: &str| {
        Error::new(ErrorKind::Usage)
            .file(target)
            .what("output")
            .expected(format!("nothing, or a folder of files with a {MARK}, which --force replaces"))
            .found(found)
    };
    if !real.is_dir() {
        return Err(not_a_model("a file"));
    }
    let entries = std::fs::read_dir(&real).map_err(|e| Error::io(&real, "reading the output folder", e))?;
    for entry in entries {
        let kind = entry.and_then(|entry| entry.file_type());
        if kind.map_err(|e| Error::io(&real, "reading the output folder", e))?.is_dir() {
            return Err(not_a_model("a folder with folders in it"));
        }
    }
    match real.join(MARK).is_file() {
        true => Ok((real, true)),
        false => Err(not_a_model("another folder")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("kestrel-folder-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    fn put(folder: &AtomicFolder, name: &str, bytes: &[u8]) {
        let file = folder.file(name, bytes.len() as u64).unwrap();
        file.write_at(0, bytes).unwrap();
        file.commit(|_| Ok(())).unwrap();
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_folder_appears_whole_replaces_only_with_force_and_leaves_nothing() {
        let dir = scratch("whole");
        let out = dir.join("model");
        let folder = AtomicFolder::create(&out, false).unwrap();
        put(&folder, "config.json", b"{}");
        put(&folder, "old", b"x");
        assert!(!out.exists());
        let check = |temp: &Path| {
            assert_eq!(names(temp), ["config.json", "old"]);
            Ok(())
        };
        folder.commit(check).unwrap();
        assert_eq!(AtomicFolder::create(&out, false).unwrap_err().kind(), ErrorKind::OutputExists);

        let failed = AtomicFolder::create(&out, true).unwrap();
        put(&failed, "config.json", b"[]");
        failed.commit(|_| Err(Error::new(ErrorKind::Interrupted))).unwrap_err();
        drop(AtomicFolder::create(&out, true).unwrap());
        assert_eq!(std::fs::read(out.join("config.json")).unwrap(), b"{}");

        let second = AtomicFolder::create(&out, true).unwrap();
        put(&second, "config.json", b"2");
        second.commit(|_| Ok(())).unwrap();
        assert_eq!((names(&out), names(&dir)), (vec!["config.json".into()], vec!["model".to_owned()]));
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn an_output_that_appears_late_is_not_replaced() {
        let dir = scratch("late");
        let out = dir.join("model");
        let folder = AtomicFolder::create(&out, false).unwrap();
        std::fs::create_dir(&out).unwrap();
        std::fs::write(out.join("mine"), b"x").unwrap();
        assert_eq!(folder.commit(|_| Ok(())).unwrap_err().kind(), ErrorKind::OutputExists);
        assert_eq!(names(&dir), ["model"]);
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn only_model_folders_are_replaced() {
        let dir = scratch("refused");
        let refused = |path: &Path| AtomicFolder::create(path, true).unwrap_err().kind();
        assert_eq!(refused(&dir), ErrorKind::Usage, "no config.json");
        std::fs::write(dir.join("config.json"), b"{}").unwrap();
        assert_eq!(refused(&dir.join("config.json")), ErrorKind::Usage, "a file");
        std::fs::create_dir(dir.join("photos")).unwrap();
        assert_eq!(refused(&dir), ErrorKind::Usage, "folders in it");
        assert_eq!(refused(Path::new("/")), ErrorKind::Usage);
        assert_eq!(names(&dir), ["config.json", "photos"]);
        std::fs::remove_dir_all(dir).unwrap();
    }
}
