//! Large values: the owner of a value sends it in pieces, and the receiver asks for several of these at a time.

use super::messages::{Message, Piece};
use async_nats::{Client, Request, RequestErrorKind};
use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use std::ops::Range;
use std::time::Duration;
use tokio::sync::Semaphore;

/// A value of at most this size travels inside its message.
pub(super) const INLINE: usize = 256 << 10;
const PIECE: usize = 512 << 10;
/// So many pieces are on their way at the same time.
const AT_ONCE: usize = 8;
/// More than any value has.
const LARGEST: u64 = 4 << 30;
/// Beside what it carries, a message has a subject, headers and the numbers of orders.
const HEADROOM: usize = 8 << 10;
/// So many come to this process, of all values: servers cut off a client with more than 64 MiB under way.
static ON_THEIR_WAY: Semaphore = Semaphore::const_new(24);
/// All of them come through a link of 600 KiB/s within this.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);
const ATTEMPTS: usize = 3;

/// How large a value may be that travels inside its message, by what the server lets through.
pub(super) fn most_inline(client: &Client) -> usize {
    INLINE.min(client.max_payload().saturating_sub(HEADROOM).max(1 << 10))
}

fn most_of_a_piece(client: &Client) -> usize {
    PIECE.min(client.max_payload().saturating_sub(64).max(1 << 10))
}

/// Where the piece is that is asked for, of a value of `whole` bytes, to be sent by this client.
pub(super) fn place(client: &Client, whole: usize, piece: &Piece) -> Range<usize> {
    let from = usize::try_from(piece.at).unwrap_or(usize::MAX).min(whole);
    let len = (piece.len as usize).min(most_of_a_piece(client)).min(whole - from);
    from..from + len
}

/// Why a value has not come.
#[derive(Debug, PartialEq)]
pub(super) enum Missing {
    /// Its owner is there, and has it no more.
    Gone,
    /// Its owner is not there.
    NoOwner,
    /// It did not come in time.
    Late,
    /// This process has no memory for it.
    NoMemory,
}

/// All of the `len` bytes that their owner has under `key`.
pub(super) async fn fetch(client: &Client, subject: &str, key: u64, len: u64) -> Result<Bytes, Missing> {
    let most = most_of_a_piece(client) as u64;
    let count = len.div_ceil(most);
    let ask = |at: u64| {
        let piece = Piece { key, at, len: most.min(len - at) as u32 };
        fetch_piece(client, subject, piece)
    };
    let mut pieces = stream::iter((0..count).map(|number| ask(number * most))).buffered(AT_ONCE);
    // The length is not trusted until the first piece is there; the reserved room becomes memory with the others.
    let mut whole = Vec::new();
    while let Some(piece) = pieces.next().await {
        let piece = piece?;
        if whole.is_empty() {
            if len > LARGEST {
                return Err(Missing::Gone);
            }
            if whole.try_reserve_exact(len as usize).is_err() {
                // A receiver that asks again does not do so at once.
                tokio::time::sleep(Duration::from_secs(1)).await;
                return Err(Missing::NoMemory);
            }
        }
        whole.extend_from_slice(&piece);
    }
    Ok(whole.into())
}

async fn fetch_piece(client: &Client, subject: &str, piece: Piece) -> Result<Bytes, Missing> {
    let mut missing = Missing::Late;
    for attempt in 0..ATTEMPTS {
        if attempt > 0 {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        // Never closed.
        let _permit = ON_THEIR_WAY.acquire().await;
        let request = Request::new().payload(piece.encode()).timeout(Some(PATIENCE));
        missing = match client.send_request(subject.to_string(), request).await {
            Ok(reply) if reply.payload.len() == piece.len as usize => return Ok(reply.payload),
            Ok(_) => return Err(Missing::Gone),
            // It may be about to connect again.
            Err(error) if error.kind() == RequestErrorKind::NoResponders => Missing::NoOwner,
            Err(_) => Missing::Late,
        };
    }
    Err(missing)
}
