//! Files that somebody else wrote: only regular ones, and texts only up to a size.

use std::fs::File;
use std::io::{Error, ErrorKind, Read, Result};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Opens a regular file, or a link to one: caches of model hubs are folders of links. Anything else is refused; a pipe
/// would be waited for, and a device has no end.
pub(crate) fn open(path: &Path) -> Result<File> {
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(Error::new(ErrorKind::InvalidInput, "it is not a regular file")),
    }
}

/// The text of a file, or what is wrong with it.
pub(crate) fn read_text(path: &Path, max_bytes: u64) -> Result<std::result::Result<String, String>> {
    let file = open(path)?;
    let mut text = String::with_capacity(file.metadata()?.len().min(max_bytes) as usize + 1);
    match file.take(max_bytes + 1).read_to_string(&mut text) {
        Ok(_) if text.len() as u64 > max_bytes => Ok(Err(format!("it is larger than {max_bytes} bytes"))),
        Ok(_) => Ok(Ok(text)),
        Err(error) if error.kind() == ErrorKind::InvalidData => Ok(Err("it is not UTF-8".into())),
        Err(error) => Err(error),
    }
}
