//! The body of an answer: pieces that are sent one after the other without a copy.

use hyper::body::{Body, Bytes, Frame, SizeHint};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

/// Pieces, of which those of a drawing are shared by all who read it.
pub(super) struct Pieces(VecDeque<Bytes>);

impl Pieces {
    pub(super) fn new<const N: usize>(pieces: [Bytes; N]) -> Self {
        Self(pieces.into_iter().filter(|piece| !piece.is_empty()).collect())
    }
}

impl From<&'static str> for Pieces {
    fn from(text: &'static str) -> Self {
        Self::new([Bytes::from_static(text.as_bytes())])
    }
}

impl From<String> for Pieces {
    fn from(text: String) -> Self {
        Self::new([text.into()])
    }
}

impl Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.pop_front().map(|piece| Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.0.iter().map(|piece| piece.len() as u64).sum())
    }
}
