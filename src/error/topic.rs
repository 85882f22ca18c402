//! The short names of the guide's page on troubleshooting, with which errors and warnings end.
#![forbid(unsafe_code)]

use std::fmt;

macro_rules! topics {
    ($($topic:ident $name:literal,)*) => {
        /// A heading of the guide's page on [troubleshooting](crate::guide::troubleshooting). Printed, it is the heading's short name in
        /// brackets.
        ///
        /// `tests/docs.rs` compares these names with the headings.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Topic {
            $($topic,)*
        }

        impl Topic {
            pub(crate) const fn name(self) -> &'static str {
                match self {
                    $(Self::$topic => $name,)*
                }
            }

            /// `None` for a name of another version of the crate.
            pub(super) fn named(name: &str) -> Option<Self> {
                match name {
                    $($name => Some(Self::$topic),)*
                    _ => None,
                }
            }
        }
    };
}

topics! {
    NotInitialized "not-initialized",
    RunInsideARuntime "run-inside-a-runtime",
    ForkServerHasThreads "fork-server-has-threads",
    ForkServerKilled "fork-server-killed",
    SlowMain "slow-main",
    MainClosesDescriptors "main-closes-descriptors",
    MainForks "main-forks",
    MainStartsItself "main-starts-itself",
    GivenRights "given-rights",
    Forked "forked",
    PreloadFailed "preload-failed",
    PreloadTooLate "preload-too-late",
    SpawnInPreload "spawn-in-preload",
    NotTheSameBuild "not-the-same-build",
    Dylib "dylib",
    TwoCopies "two-copies",
    NoRuntime "no-runtime",
    NoProc "no-proc",
    Died "died",
    OutOfMemory "out-of-memory",
    Panicked "panicked",
    MemoryLimit "memory-limit",
    WaitsForChildren "waits-for-children",
    CannotKill "cannot-kill",
    ResultTaken "result-taken",
    RestartLimit "restart-limit",
    TracesDropped "traces-dropped",
    PoolBroken "pool-broken",
    Initializer "initializer",
    Timeout "timeout",
    NoWorkerWasFree "no-worker-was-free",
    NoRoom "no-room",
    RuntimeEnded "runtime-ended",
    PoolClosed "pool-closed",
    CloseFirst "close-first",
    CheckoutGone "checkout-gone",
    SourcePanicked "source-panicked",
    WorkerLate "worker-late",
    TooLarge "too-large",
    TooDeep "too-deep",
    CannotRead "cannot-read",
    HandleOutsideAMessage "handle-outside-a-message",
    HandleInBroadcast "handle-in-broadcast",
    TaskDone "task-done",
    OtherEndGone "other-end-gone",
    Lagged "lagged",
    Leases "leases",
    QueueTooLong "queue-too-long",
    OwnerDied "owner-died",
    BarrierBroken "barrier-broken",
    GuardOfAnother "guard-of-another",
    Damaged "damaged",
    ArrayGuard "array-guard",
    NameTaken "name-taken",
    TooManyDescriptors "too-many-descriptors",
    DescriptorsOnTheirWay "descriptors-on-their-way",
    NoSharedMemory "no-shared-memory",
    FileSize "file-size",
    ProcessLimit "process-limit",
    TooManyProcesses "too-many-processes",
    NoPidfd "no-pidfd",
    CallRefused "call-refused",
    Stopped "stopped",
    WrongKey "wrong-key",
    HandshakeCut "handshake-cut",
    NoTls "no-tls",
    Md5Refused "md5-refused",
    MessageTooLong "message-too-long",
    OtherProtocol "other-protocol",
    ManagerGone "manager-gone",
    ManagerSilent "manager-silent",
    WaitInManager "wait-in-manager",
    ManagerClient "manager-client",
    NotExposed "not-exposed",
    OtherBuildOfManager "other-build-of-manager",
    DashboardForOthers "dashboard-for-others",
    ClusterUnavailable "cluster-unavailable",
    ClusterRefused "cluster-refused",
    ClusterSlow "cluster-slow",
    ClusterMessageLost "cluster-message-lost",
    ClusterGarbage "cluster-garbage",
    HostsOfAnotherBuild "hosts-of-another-build",
    HostLost "host-lost",
    CannotCrossHosts "cannot-cross-hosts",
}

impl Topic {
    /// The topic that `text` ends with, and the text before it. Only in a text can a topic pass through a panic, or an error of another type.
    ///
    /// A word in brackets that [`separator`](Self::separator) would not have put there belongs to the text, such as `limits[timeout]`.
    pub(crate) fn cut(text: &str) -> (&str, Option<Self>) {
        let cut = || {
            let (before, name) = text.trim_end().strip_suffix(']')?.rsplit_once('[')?;
            let topic = Self::named(name)?;
            let before = before.strip_suffix([' ', '\n'])?;
            let is_ours = text.as_bytes()[before.len()] == Self::separator(before) as u8;
            is_ours.then_some((before, topic))
        };
        cut().map_or((text, None), |(before, topic)| (before, Some(topic)))
    }

    /// The character between an error's text and its short name.
    pub(super) fn separator(text: &str) -> char {
        if text.contains('\n') { '\n' } else { ' ' }
    }
}

impl fmt::Display for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}]", self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_cut_off_only_where_display_would_put_it() {
        let cut = |text| Topic::cut(text);
        assert_eq!(cut("it ended [died]"), ("it ended", Some(Topic::Died)));
        assert_eq!(cut("it ended\nat once\n[died]\n"), ("it ended\nat once", Some(Topic::Died)));
        for text in [
            "limits[died]",
            "it ended\nat once [died]",
            "it ended\n[died]",
            "[died]",
            "it ended [unknown]",
            "it ended [died] and more",
        ] {
            assert_eq!(cut(text), (text, None));
        }
    }
}
