//! [pipe(2)](https://man7.org/linux/man-pages/man2/pipe.2.html).

use super::refuse;
use std::io::{self, PipeReader, PipeWriter};

/// Its two ends, close-on-exec.
pub(crate) fn pair() -> io::Result<(PipeReader, PipeWriter)> {
    refuse::at("pipe")?;
    io::pipe()
}
