//! Messages on a byte stream, cut as CPython's `multiprocessing.connection` cuts them.
//!
//! ```text
//! up to 2^31 - 1 bytes   length: 4 bytes, signed, big-endian                     message
//! more                   -1 in 4 bytes, then the length: 8 bytes, big-endian     message
//! ```
//!
//! # Cancel
//! Receiving: all that has arrived is in the [`FrameReader`], nothing in the future, so dropping it loses nothing.
//!
//! Sending: dropped before its first byte was taken by the stream, nothing is sent. After that the rest of the message
//! is copied out of the borrowed slice and a task of its own finishes it; the writer goes along and comes back to
//! the next sender. So a message goes whole or not at all, and no later one gets between its bytes. Once
//! the writer itself is dropped, that task has [`LINGER`] to end; then the stream is cut, and the other end has an error.

use crate::error::{Error, ErrorKind, Result, Topic};
use crate::os::timer;
use bytes::{Buf, BufMut, BytesMut};
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

const SHORT: usize = 4;
const LONG: usize = 12;
/// The stream is read in pieces of this size, so that small messages share a system call.
const AHEAD: usize = 64 << 10;
/// The most memory that a length alone may reserve; beyond it memory grows with the bytes that arrive.
const TRUSTED: usize = 1 << 20;
/// A sink flushes itself when it holds this much.
const BUFFERED: usize = 64 << 10;
/// How long a message that is half out may take once nobody holds its connection any more.
pub(crate) const LINGER: Duration = if cfg!(test) { Duration::from_millis(200) } else { Duration::from_secs(30) };

/// A header as it goes out: the last `len` of its bytes.
struct Header {
    bytes: [u8; LONG],
    len: usize,
}

impl Header {
    fn of(len: usize) -> Self {
        let mut bytes = [0xff; LONG];
        match i32::try_from(len) {
            Ok(short) => {
                bytes[LONG - SHORT..].copy_from_slice(&short.to_be_bytes());
                Self { bytes, len: SHORT }
            }
            Err(_) => {
                bytes[SHORT..].copy_from_slice(&(len as u64).to_be_bytes());
                Self { bytes, len: LONG }
            }
        }
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes[LONG - self.len..]
    }
}

/// The length in a header and the size of that header; `None` if it is not complete yet.
fn parse(bytes: &[u8]) -> Result<Option<(u64, usize)>> {
    let Some((short, rest)) = bytes.split_first_chunk::<SHORT>() else { return Ok(None) };
    match i32::from_be_bytes(*short) {
        len @ 0.. => Ok(Some((len as u64, SHORT))),
        -1 => Ok(rest.first_chunk().map(|long| (u64::from_be_bytes(*long), LONG))),
        len => {
            let why = format!("a message of {len} bytes: the other end speaks otherwise");
            Err(Error::new(ErrorKind::Decode, why).explained_by(Topic::OtherProtocol))
        }
    }
}

/// Reads messages from a stream.
pub(crate) struct FrameReader<R> {
    io: R,
    limit: u64,
    /// Bytes that were read and are not part of a message yet.
    ahead: BytesMut,
    /// The message that is arriving, and its whole length.
    message: Option<(Vec<u8>, usize)>,
    /// The result of `poll_ready`.
    ready: Option<Result<Vec<u8>>>,
    /// After an error the borders between messages are lost, and after the end there are none.
    has_ended: bool,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// Accepts messages of up to `limit` bytes.
    pub(crate) fn new(io: R, limit: u64) -> Self {
        Self { io, limit, ahead: BytesMut::new(), message: None, ready: None, has_ended: false }
    }

    /// Counts from the next message that has not begun to arrive.
    pub(crate) fn set_limit(&mut self, limit: u64) {
        self.limit = limit;
    }

    pub(crate) async fn recv(&mut self) -> Result<Vec<u8>> {
        poll_fn(|cx| self.poll_recv(cx)).await
    }

    /// The next message. `Closed` at the end of the stream, and ever after the first error.
    pub(crate) fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Result<Vec<u8>>> {
        if let Some(ready) = self.ready.take() {
            return Poll::Ready(ready);
        }
        if self.has_ended {
            return Poll::Ready(Err(Error::closed("connection")));
        }
        let received = ready!(self.poll_message(cx));
        if received.is_err() {
            self.has_ended = true;
            (self.ahead, self.message) = (BytesMut::new(), None);
        }
        Poll::Ready(received)
    }

    /// Ready when `poll_recv` would be.
    pub(crate) fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let received = ready!(self.poll_recv(cx));
        self.ready = Some(received);
        Poll::Ready(())
    }

    fn poll_message(&mut self, cx: &mut Context<'_>) -> Poll<Result<Vec<u8>>> {
        loop {
            if let Some((message, len)) = &mut self.message {
                let at_hand = (*len - message.len()).min(self.ahead.len());
                message.extend_from_slice(&self.ahead[..at_hand]);
                self.ahead.advance(at_hand);
                let missing = *len - message.len();
                if missing == 0 {
                    let message = std::mem::take(message);
                    self.message = None;
                    return Poll::Ready(Ok(message));
                }
                if message.len() == message.capacity() {
                    let more = missing.min(message.len().max(TRUSTED));
                    message.try_reserve_exact(more).map_err(|_| too_long(*len as u64, "there is memory for"))?;
                }
                if ready!(poll_read(&mut self.io, &mut message.limit(missing), cx)).map_err(torn)? == 0 {
                    return Poll::Ready(Err(torn(io::ErrorKind::UnexpectedEof.into())));
                }
            } else if let Some((len, header)) = parse(&self.ahead)? {
                if len > self.limit {
                    return Poll::Ready(Err(too_long(
                        len,
                        &format!("the limit of {} bytes (max_message)", self.limit),
                    )));
                }
                let len = usize::try_from(len).map_err(|_| too_long(len, "an address"))?;
                self.ahead.advance(header);
                self.message = Some((Vec::with_capacity(len.min(TRUSTED)), len));
            } else {
                let piece = AHEAD.min((self.limit as usize).saturating_add(LONG));
                self.ahead.reserve(piece);
                let room = piece.saturating_sub(self.ahead.len()).max(LONG);
                match ready!(poll_read(&mut self.io, &mut (&mut self.ahead).limit(room), cx)) {
                    Ok(0) if self.ahead.is_empty() => return Poll::Ready(Err(Error::closed("connection"))),
                    Ok(0) => return Poll::Ready(Err(torn(io::ErrorKind::UnexpectedEof.into()))),
                    Ok(_) => {}
                    Err(error) if self.ahead.is_empty() => return Poll::Ready(Err(gone(error, "cannot receive"))),
                    Err(error) => return Poll::Ready(Err(torn(error))),
                }
            }
        }
    }
}

fn poll_read<R, B>(io: &mut R, buffer: &mut B, cx: &mut Context<'_>) -> Poll<io::Result<usize>>
where
    R: AsyncRead + Unpin,
    B: BufMut,
{
    // This future keeps no state of its own, so each poll can make a new one.
    let mut read = std::pin::pin!(io.read_buf(buffer));
    read.as_mut().poll(cx)
}

fn torn(error: io::Error) -> Error {
    Error::io("the other end is gone in the middle of a message", error)
}

fn too_long(len: u64, than: &str) -> Error {
    let why = format!("a message of {len} bytes is longer than {than}");
    Error::new(ErrorKind::Decode, why).explained_by(Topic::MessageTooLong)
}

/// Turns each error by which the kernel reports that the other end is gone into `Closed`.
fn gone(error: io::Error, doing: &str) -> Error {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, UnexpectedEof};
    if tokio::runtime::is_rt_shutdown_err(&error) {
        let why = "the connection has ended, because its runtime has ended";
        return Error::new(ErrorKind::Closed, why).explained_by(Topic::RuntimeEnded).with_source(error);
    }
    match error.kind() {
        BrokenPipe | ConnectionAborted | ConnectionReset | NotConnected | UnexpectedEof => {
            Error::closed("connection").with_source(error)
        }
        _ => Error::io(doing, error),
    }
}

/// A stream that a task writes to.
type Finishing<W> = JoinHandle<(W, io::Result<()>)>;

/// Writes messages to a stream.
pub(crate) struct FrameWriter<W: AsyncWrite + Unpin + Send + 'static> {
    /// `None` while `finishing`, and after an error.
    io: Option<W>,
    /// A task that writes the rest of a dropped send, and the channel that closes when this writer is dropped.
    finishing: Option<(Finishing<W>, oneshot::Sender<()>)>,
    /// Whole messages that wait for a flush, of which the first `written` bytes are out.
    pending: Vec<u8>,
    written: usize,
    /// The stream may hold bytes in a buffer of its own.
    needs_flush: bool,
    runtime: Handle,
}

impl<W: AsyncWrite + Unpin + Send + 'static> FrameWriter<W> {
    /// # Panics
    /// Outside a tokio runtime.
    pub(crate) fn new(io: W) -> Self {
        let runtime = Handle::current();
        Self { io: Some(io), finishing: None, pending: Vec::new(), written: 0, needs_flush: false, runtime }
    }

    /// Sends `message` after all earlier ones. A dropped future sends all of it or nothing.
    pub(crate) async fn send(&mut self, message: &[u8]) -> Result<()> {
        if !self.is_idle() {
            poll_fn(|cx| self.poll_flush(cx)).await?;
        }
        let header = Header::of(message.len());
        let mut sending = Sending { writer: self, header, message, done: 0 };
        poll_fn(|cx| sending.poll(cx)).await
    }

    fn is_idle(&self) -> bool {
        self.io.is_some() && self.pending.is_empty() && !self.needs_flush
    }

    /// Takes `message` into the buffer; `poll_flush` sends it.
    pub(crate) fn buffer(&mut self, message: &[u8]) {
        self.pending.extend_from_slice(Header::of(message.len()).bytes());
        self.pending.extend_from_slice(message);
    }

    /// Ready when the buffer may take another message.
    pub(crate) fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        match self.pending.len() < BUFFERED && self.io.is_some() {
            true => Poll::Ready(Ok(())),
            false => self.poll_flush(cx),
        }
    }

    /// Ready when everything is sent.
    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let flushed = ready!(self.poll_write_out(cx));
        Poll::Ready(flushed.map_err(|error| self.fail(error)))
    }

    /// Flushes, then closes this direction.
    pub(crate) fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        ready!(self.poll_flush(cx))?;
        let Some(io) = &mut self.io else { return Poll::Ready(Ok(())) };
        let closed = ready!(Pin::new(io).poll_shutdown(cx));
        self.io = None;
        Poll::Ready(closed.map_err(|error| gone(error, "cannot close")))
    }

    fn poll_write_out(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some((task, _)) = &mut self.finishing {
            let joined = ready!(Pin::new(task).poll(cx));
            self.finishing = None;
            let (io, finished) = joined.map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
            finished?;
            self.io = Some(io);
        }
        let Some(io) = &mut self.io else { return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())) };
        while self.written < self.pending.len() {
            match ready!(Pin::new(&mut *io).poll_write(cx, &self.pending[self.written..]))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                n => self.written += n,
            }
            self.needs_flush = true;
        }
        self.written = 0;
        self.pending.clear();
        self.pending.shrink_to(2 * BUFFERED);
        if self.needs_flush {
            ready!(Pin::new(io).poll_flush(cx))?;
            self.needs_flush = false;
        }
        Poll::Ready(Ok(()))
    }

    /// After an error the stream may be cut anywhere, so it takes nothing more.
    fn fail(&mut self, error: io::Error) -> Error {
        (self.io, self.pending, self.written) = (None, Vec::new(), 0);
        gone(error, "cannot send")
    }

    /// Hands the stream to a task that writes `rest`.
    fn finish(&mut self, rest: Vec<u8>) {
        let Some(mut io) = self.io.take() else { return };
        let (waits, gone) = oneshot::channel::<()>();
        let task = self.runtime.spawn(async move {
            let finish = async {
                io.write_all(&rest).await?;
                io.flush().await
            };
            let finished = tokio::select! {
                finished = finish => finished,
                () = async { let _ = gone.await; timer::sleep(LINGER).await } => {
                    Err(io::ErrorKind::TimedOut.into())
                }
            };
            (io, finished)
        });
        self.finishing = Some((task, waits));
    }
}

impl<W: AsyncWrite + Unpin + Send + 'static> Drop for FrameWriter<W> {
    fn drop(&mut self) {
        // A stream may keep bytes until it is flushed, as TLS does.
        if self.written < self.pending.len() || self.needs_flush {
            let rest = self.pending.split_off(self.written);
            self.finish(rest);
        }
    }
}

/// A message on its way out of a borrowed slice.
struct Sending<'a, W: AsyncWrite + Unpin + Send + 'static> {
    writer: &'a mut FrameWriter<W>,
    header: Header,
    message: &'a [u8],
    /// Bytes of header and message that the stream has taken.
    done: usize,
}

impl<W: AsyncWrite + Unpin + Send + 'static> Sending<'_, W> {
    fn len(&self) -> usize {
        self.header.len + self.message.len()
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let sent = ready!(self.poll_write(cx));
        Poll::Ready(sent.map_err(|error| self.writer.fail(error)))
    }

    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.done < self.len() {
            let [header, message] = rest(&self.header, self.message, self.done);
            let slices = [IoSlice::new(header), IoSlice::new(message)];
            let Some(io) = &mut self.writer.io else { return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())) };
            let io = Pin::new(io);
            let wrote = match header.is_empty() {
                true => io.poll_write(cx, message),
                false => io.poll_write_vectored(cx, &slices),
            };
            match ready!(wrote)? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                n => self.done += n,
            }
            self.writer.needs_flush = true;
        }
        self.writer.poll_write_out(cx)
    }
}

impl<W: AsyncWrite + Unpin + Send + 'static> Drop for Sending<'_, W> {
    fn drop(&mut self) {
        let is_flushed = self.done == self.len() && !self.writer.needs_flush;
        if 0 < self.done && !is_flushed {
            let rest = rest(&self.header, self.message, self.done).concat();
            self.writer.finish(rest);
        }
    }
}

/// The rest of a header and its message after the first `done` bytes of both.
fn rest<'a>(header: &'a Header, message: &'a [u8], done: usize) -> [&'a [u8]; 2] {
    let header = header.bytes();
    match done.checked_sub(header.len()) {
        None => [&header[done..], message],
        Some(done) => [&[], &message[done..]],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;
    use tokio::io::ReadBuf;

    #[test]
    fn a_header_is_short_up_to_two_gib_and_long_from_there() {
        let cases: [(usize, &[u8]); 4] = [
            (0, &[0, 0, 0, 0]),
            (16_385, &[0, 0, 0x40, 1]),
            (0x7fff_ffff, &[0x7f, 0xff, 0xff, 0xff]),
            (0x8000_0000, &[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0x80, 0, 0, 0]),
        ];
        for (len, bytes) in cases {
            assert_eq!(Header::of(len).bytes(), bytes);
            assert_eq!(parse(bytes).unwrap(), Some((len as u64, bytes.len())));
            for cut in 0..bytes.len() {
                assert_eq!(parse(&bytes[..cut]).unwrap(), None);
            }
        }
        assert!(parse(&(-2i32).to_be_bytes()).is_err());
    }

    /// A stream that comes in the pieces given, with a pause after each.
    struct Pieces(VecDeque<Vec<u8>>, bool);

    impl AsyncRead for Pieces {
        fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            self.1 = !self.1;
            if self.1 {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            if let Some(mut piece) = self.0.pop_front() {
                let rest = piece.split_off(piece.len().min(into.remaining()));
                into.put_slice(&piece);
                if !rest.is_empty() {
                    self.0.push_front(rest);
                }
            }
            Poll::Ready(Ok(()))
        }
    }

    /// xorshift
    fn random(state: &mut u64) -> u64 {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        *state
    }

    fn pieces(mut bytes: Vec<u8>, state: &mut u64) -> Pieces {
        let mut pieces = VecDeque::new();
        while !bytes.is_empty() {
            let at = (1 + random(state) as usize % 40_000 % (1 << (random(state) % 17))).min(bytes.len());
            let rest = bytes.split_off(at);
            pieces.push_back(std::mem::replace(&mut bytes, rest));
        }
        Pieces(pieces, false)
    }

    #[tokio::test]
    async fn messages_are_the_same_in_whatever_pieces_they_come() {
        let state = &mut 88_172_645_463_325_252;
        for _ in 0..100 {
            let sizes: Vec<_> = (0..20).map(|_| random(state) as usize % (1 << (random(state) % 18))).collect();
            let messages: Vec<_> = sizes.into_iter().map(|size| vec![random(state) as u8; size]).collect();
            let bytes = messages.iter().flat_map(|m| [Header::of(m.len()).bytes(), m].concat()).collect();
            let mut reader = FrameReader::new(pieces(bytes, state), 1 << 20);
            for message in &messages {
                assert!(reader.recv().await.unwrap() == *message);
            }
            assert_eq!(reader.recv().await.unwrap_err().kind(), ErrorKind::Closed);
        }
    }

    #[tokio::test]
    async fn any_bytes_are_messages_within_the_limit_and_then_one_error() {
        let state = &mut 2_463_534_242;
        for _ in 0..2_000 {
            let len = random(state) as usize % 300;
            let mut bytes: Vec<_> = (0..len).map(|_| random(state) as u8).collect();
            // Lengths that random bytes hardly ever are.
            for header in bytes.chunks_mut(20) {
                let (keeps, byte) = (random(state).is_multiple_of(3), [0, 0, 0, 0, 0xff][random(state) as usize % 5]);
                let high = header.len().min(if keeps { 0 } else { 3 });
                header[..high].fill(byte);
            }
            let mut reader = FrameReader::new(pieces(bytes, state), 100);
            let error = loop {
                match reader.recv().await {
                    Ok(message) => assert!(message.len() <= 100 && message.capacity() <= 100),
                    Err(error) => break error,
                }
            };
            assert!(matches!(error.kind(), ErrorKind::Closed | ErrorKind::Decode | ErrorKind::Io), "{error}");
            assert_eq!(reader.recv().await.unwrap_err().kind(), ErrorKind::Closed);
        }
    }

    #[tokio::test]
    async fn a_message_that_is_not_received_is_given_up_some_time_after_its_connection() {
        let (near, mut far) = tokio::io::duplex(100);
        let mut writer = FrameWriter::new(near);
        let sent = tokio::time::timeout(Duration::from_millis(10), writer.send(&[7; 1_000])).await;
        assert!(sent.is_err(), "it waits for a reader");
        tokio::time::sleep(2 * LINGER).await;
        drop(writer);
        let cut = async {
            while far.write_all(b"?").await.is_ok() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), cut).await.expect("it is cut");
        let mut arrived = Vec::new();
        far.read_to_end(&mut arrived).await.unwrap();
        assert_eq!(arrived.len(), 100, "what the stream had room for, and then the end");
    }

    /// Takes all that is written at once, and passes it on when it is flushed, which takes a while.
    #[derive(Default)]
    struct Kept {
        kept: Vec<u8>,
        out: std::sync::Arc<std::sync::Mutex<Vec<u8>>>,
        was_asked: bool,
    }

    impl AsyncWrite for Kept {
        fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
            self.kept.extend_from_slice(bytes);
            Poll::Ready(Ok(bytes.len()))
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            if !std::mem::replace(&mut self.was_asked, true) {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            let kept = std::mem::take(&mut self.kept);
            self.out.lock().unwrap().extend(kept);
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            self.poll_flush(cx)
        }
    }

    #[tokio::test]
    async fn a_send_that_is_dropped_while_it_is_flushed_leaves_in_the_background() {
        let stream = Kept::default();
        let out = stream.out.clone();
        let mut writer = FrameWriter::new(stream);
        assert!(futures::poll!(std::pin::pin!(writer.send(b"whole"))).is_pending());
        drop(writer);
        tokio::time::timeout(Duration::from_secs(20), async {
            while *out.lock().unwrap() != b"\0\0\0\x05whole" {
                tokio::task::yield_now().await;
            }
        })
        .await
        .expect("it was flushed");
    }
}
