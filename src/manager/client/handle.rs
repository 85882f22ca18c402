//! Handles of objects, and how they travel: to and from their manager as references, past it under a lease.
//!
//! A lease is one end of a pipe in the message. The manager holds the object until the other end is closed everywhere: when the
//! receiver has claimed its handle, or the message is lost.

use super::link::Link;
use crate::error::Result;
use crate::manager::wire::greeting::Id;
use crate::manager::wire::marshal::{self, End, Kept, Leased, Travelling};
use crate::manager::wire::messages::{self, CONNECTION};
use crate::os::{fork, pipe};
use crate::wire::{Attachment, attach};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::any::Any;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

/// One hold on an object, given back when dropped.
pub(crate) struct Handle {
    pub(crate) link: Arc<Link>,
    pub(crate) object: u64,
    /// The object that this handle is part of, in the manager itself; else the connection.
    owner: u64,
}

impl Handle {
    /// A handle that the connection counts already.
    pub(crate) fn counted(link: &Arc<Link>, object: u64) -> Self {
        let owner = link.owner_of_new_handles();
        if owner != CONNECTION {
            link.tell(messages::CLAIM, &[object, owner]);
            link.release(object);
        }
        Self { link: link.clone(), object, owner }
    }

    /// One more handle of an object that is held meanwhile.
    pub(crate) fn claimed(link: &Arc<Link>, object: u64) -> Self {
        let owner = link.owner_of_new_handles();
        link.tell(messages::CLAIM, &[object, owner]);
        Self { link: link.clone(), object, owner }
    }

    /// The handle of a reference that arrived by `end`.
    fn taken(end: Arc<dyn End>, object: u64) -> Result<Self> {
        match (end.clone() as Arc<dyn Any + Send + Sync>).downcast() {
            Ok(link) => Ok(Self::counted(&link, object)),
            // In the manager: the message has held it so far.
            Err(_) => Link::here().map(|link| {
                let handle = Self::claimed(&link, object);
                end.release(object);
                handle
            }),
        }
    }

    fn lease(&self) -> Result<Leased, String> {
        let connector = self.link.connector.as_ref();
        let connector =
            connector.ok_or("it is of a manager on another host, to which its receiver must connect itself")?;
        let is_it = |Leaving(_, leased): &Leaving| leased.manager == self.link.id;
        let Leaving(lease, leased) = *attach::in_common(is_it, || Leaving::new(&self.link, connector))?;
        self.link.lease(lease, self.object);
        Ok(Leased { object: self.object, ..leased })
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if !fork::is_forked() {
            self.link.tell(messages::RELEASE, &[self.object, self.owner]);
        }
    }
}

/// The object lease that the handles of one outgoing message share: its number, and their form but for the object.
struct Leaving(u64, Leased);

impl Leaving {
    fn new(link: &Arc<Link>, connector: &Arc<OwnedFd>) -> Result<Self, String> {
        let attach =
            |attachment| attach::leave::<serde::de::value::Error>(attachment).map_err(|error| error.to_string());
        let (reader, writer) = pipe::pair().map_err(|error| error.to_string())?;
        let end = attach(Attachment::owned(writer.into()).of("proxy of a manager"))?;
        link.be_connected().map_err(|error| error.to_string())?;
        let lease = link.last_lease.fetch_add(1, Relaxed);
        // It ends when the other end of `reader` is closed everywhere.
        link.hand_over(messages::LEASE_OPEN, &[lease], reader.into());
        let connector = attach(Attachment::Shared(connector.clone()))?;
        Ok(Self(lease, Leased { manager: link.id, pid: link.pid, object: 0, connector, end }))
    }
}

/// The object lease that the handles of one incoming message share.
struct Arriving {
    manager: Id,
    link: Arc<Link>,
    end: Option<OwnedFd>,
}

impl Drop for Arriving {
    /// After the last claim: the end of the lease follows it, by the same way.
    fn drop(&mut self) {
        self.end.take().into_iter().for_each(|end| self.link.hand_over(messages::CLAIMED, &[], end));
    }
}

/// The serde form of a handle that others may have too.
pub(crate) fn serialize<S: Serializer>(handle: &Arc<Handle>, serializer: S) -> Result<S::Ok, S::Error> {
    attach::refuse_attempt::<S::Error>()?;
    let kept = || -> Kept { handle.clone() };
    let failed = |why: String| serde::ser::Error::custom(format_args!("a handle cannot leave: {why}"));
    match marshal::leave(handle.link.id, handle.object, Arc::as_ptr(&handle.link).cast(), kept) {
        Ok(true) => Travelling::Reference(handle.object).serialize(serializer),
        Ok(false) => Travelling::Leased(handle.lease().map_err(failed)?).serialize(serializer),
        Err(why) => Err(serde::ser::Error::custom(why)),
    }
}

impl<'de> Deserialize<'de> for Handle {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let leased = match Travelling::deserialize(deserializer)? {
            Travelling::Leased(leased) => leased,
            Travelling::Reference(object) => {
                let end = marshal::take(object, attach::reads_once::<D>());
                let end = end.ok_or_else(|| D::Error::custom("a handle of an object that was not given"))?;
                return Self::taken(end, object).map_err(D::Error::custom);
            }
        };
        let arriving = attach::in_common(
            |arriving: &Arriving| arriving.manager == leased.manager,
            || {
                let end = attach::take::<D>(leased.end)?;
                let connector = attach::take::<D>(leased.connector)?;
                let link = Link::to(leased.manager, leased.pid, connector).map_err(D::Error::custom)?;
                link.be_connected().map_err(D::Error::custom)?;
                Ok::<_, D::Error>(Arriving { manager: leased.manager, link, end: Some(end) })
            },
        )?;
        Ok(Self::claimed(&arriving.link, leased.object))
    }
}
