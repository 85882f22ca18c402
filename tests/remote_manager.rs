//! Managers that are reached through a socket. Names begin with the row of the reference suite.

mod common;
mod programs;

use common::{Random, eventually, go_on, in_child, objects_go, resident_bytes, stop, within};
use futures::{FutureExt, StreamExt, TryStreamExt};
use multiprocess::connection::{Listener, connect};
use multiprocess::{self as mp, DictProxy, ErrorKind, Exposed, Fd, ListProxy, Manager, Process, Proxy, Queue};
use std::collections::HashMap;
use std::time::{Duration, Instant};

mp::test_support!();
common::quiet::quiet_stderr!();

const KEY: &[u8] = b"a key of both ends";

struct Tally(i64);

impl Tally {
    fn new(total: i64) -> Self {
        Self(total)
    }

    fn add(&mut self, n: i64) -> i64 {
        self.0 += n;
        self.0
    }

    fn fill_slowly(&mut self, len: usize, done: Queue<()>) -> Vec<u8> {
        std::thread::sleep(Duration::from_millis(10));
        done.blocking_put(()).unwrap();
        vec![1; len]
    }

    fn add_slowly(&mut self, n: i64, pause: Duration) -> i64 {
        std::thread::sleep(pause);
        self.add(n)
    }
}

async fn start() -> (Manager, String) {
    start_at("127.0.0.1:0").await
}

async fn start_at(address: &str) -> (Manager, String) {
    let manager = Manager::builder().bind(address).authkey(KEY).start().await.unwrap();
    let address = manager.address().await.unwrap().unwrap();
    (manager, address)
}

type Mixed = (Option<u8>, bool, f64, String, Vec<u8>);

fn mixed() -> Vec<Mixed> {
    vec![(None, true, 2.25, "häß".into(), vec![0, 255]), (Some(3), false, -0.5, String::new(), vec![])]
}

async fn put_all(address: String) -> mp::Result<()> {
    let manager = Manager::connect(&address, KEY).await?;
    let list: ListProxy<Mixed> = manager.names().get("list").await?.ok_or_else(|| mp::Error::other("no list"))?;
    for value in mixed() {
        list.push(value).await?;
    }
    list.push((Some(9), true, 0.0, manager.pid().to_string(), vec![])).await
}

#[tokio::test]
async fn rmgr_01_values_of_a_connected_process_arrive_unchanged() {
    let path = std::env::temp_dir().join(format!("manager-{}", common::alone::unique()));
    let name = format!("\0multiprocess-manager-{}", common::alone::unique());
    for address in ["127.0.0.1:0", "[::1]:0", path.to_str().unwrap(), &name] {
        within(async {
            let (manager, address) = start_at(address).await;
            let list = manager.list::<Mixed>().await.unwrap();
            manager.names().set("list", list.clone()).await.unwrap();
            in_child(put_all, (address,)).await.unwrap();
            let mut expected = mixed();
            expected.push((Some(9), true, 0.0, manager.pid().to_string(), vec![]));
            assert_eq!(list.to_vec().await.unwrap(), expected);
            manager.shutdown().await.unwrap();
        })
        .await;
    }
    assert!(!path.exists(), "the socket file went with the manager");
}

/// The connection is read in the runtime that it was made in.
#[test]
fn call_fails_once_the_runtime_of_its_connection_has_ended() {
    let new = || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (first, second) = (tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap(), new());
    let manager_and_address = second.block_on(within(start_at("127.0.0.1:0")));
    let (there, gate) = first.block_on(within(async {
        let there = Manager::connect(&manager_and_address.1, KEY).await.unwrap();
        let gate = there.event().await.unwrap();
        (there, gate)
    }));
    let waiting = second.spawn({
        let gate = gate.clone();
        async move { gate.wait().await }
    });
    drop(first);
    let waited = second.block_on(within(waiting)).unwrap();
    let error = waited.unwrap_err();
    assert_eq!((error.kind(), error.help()), (ErrorKind::Closed, Some("runtime-ended")));
    assert_eq!(second.block_on(within(gate.is_set())).unwrap_err().kind(), ErrorKind::Closed);
    drop((there, gate));
    second.block_on(within(manager_and_address.0.shutdown())).unwrap();
}

#[tokio::test]
async fn rmgr_03_a_new_manager_on_the_address_of_one_just_closed() {
    let path = std::env::temp_dir().join(format!("manager-again-{}", common::alone::unique()));
    within(async {
        for first in ["127.0.0.1:0", path.to_str().unwrap()] {
            // Another program may have been given the port that was free for a moment.
            for tries in 1.. {
                let Err(error) = start_again(first).await else { break };
                assert!(first.ends_with(":0") && error.to_string().contains("in use") && tries < 20, "{error}");
            }
        }
    })
    .await;
}

/// Starts managers one after the other at the same address.
async fn start_again(first: &str) -> mp::Result<()> {
    let start_at = |address: &str| Manager::builder().bind(address).authkey(KEY).start();
    let manager = start_at(first).await?;
    let address = manager.address().await?.unwrap();
    let there = Manager::connect(&address, KEY).await?;
    there.list::<u32>().await?;
    manager.shutdown().await?;
    let manager = start_at(&address).await?;
    assert_eq!(manager.address().await?.unwrap(), address);
    Manager::connect(&address, KEY).await?.list::<u32>().await?;
    let busy = start_at(&address).await.unwrap_err();
    assert!(busy.kind() == ErrorKind::Io && busy.to_string().contains(&address), "{busy}");
    // Killed, it leaves its socket file behind.
    kill(&manager);
    eventually("it is gone", || mp::active_children().iter().all(|child| child.pid() != manager.pid())).await;
    start_at(&address).await?.shutdown().await
}

fn kill(manager: &Manager) {
    let pid = rustix::process::Pid::from_raw(manager.pid() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

#[tokio::test]
async fn rmgr_05_another_key_nobody_there_and_a_killed_manager() {
    within(async {
        let (manager, address) = start().await;
        let error = Manager::connect(&address, b"another").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Authentication, "{error}");
        let error = Manager::connect("/nobody/is/here", KEY).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io, "{error}");
        let there = Manager::connect(&address, KEY).await.unwrap();
        let list = there.list::<u32>().await.unwrap();
        kill(&manager);
        let error = list.push(1).await.unwrap_err();
        assert!(error.kind() == ErrorKind::Closed && error.to_string().contains(&address), "{error}");
        // Its socket may be a moment behind its connections.
        let refused = async || Manager::connect(&address, KEY).await.err().map(|error| error.kind());
        while refused().await != Some(ErrorKind::Io) {
            tokio::task::yield_now().await;
        }
        assert!(Manager::builder().bind("127.0.0.1:0").start().await.unwrap_err().to_string().contains("authkey"));
        assert!(Manager::builder().authkey(KEY).start().await.unwrap_err().to_string().contains("bind"));
        let error = Manager::builder().bind("nonsense").authkey(KEY).start().await.unwrap_err();
        assert!(error.to_string().contains("nonsense"), "{error}");
    })
    .await;
}

#[tokio::test]
async fn p25_thousand_silent_peers_delay_no_client() {
    within(async {
        let (manager, address) = start().await;
        let before = resident_bytes(manager.pid());
        let mut silent = Vec::new();
        for _ in 0..1000 {
            silent.push(tokio::net::TcpStream::connect(&address).await.unwrap());
        }
        // Some that know the key, and then say nothing.
        let mut mute = Vec::new();
        for _ in 0..10 {
            mute.push(connect(&address, Some(KEY)).await.unwrap());
        }
        let another = async || {
            let start = Instant::now();
            let there = Manager::connect(&address, KEY).await?;
            let took = start.elapsed();
            let tally = there.create(Tally::new, (1,)).await?;
            assert_eq!(tally.call(Tally::add, (1,)).await?, 2);
            Ok(took)
        };
        // The machine may be busy with other things, the silent are there all the time.
        common::rounds(another, |took| *took < Duration::from_millis(50)).await.unwrap();
        let grown = resident_bytes(manager.pid()).saturating_sub(before);
        assert!(grown < 32 << 20, "{grown} bytes for 1000 peers");
        drop((silent, mute));
        manager.shutdown().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn p25_flood_and_wrong_keys_leave_the_manager_unchanged() {
    within(async {
        let (manager, address) = start().await;
        let there = Manager::connect(&address, KEY).await.unwrap();
        let tally = there.create(Tally::new, (0,)).await.unwrap();
        let before = (resident_bytes(manager.pid()), common::holdings_of(manager.pid()).descriptors);
        for round in 1..=10 {
            for _ in 0..100 {
                drop(tokio::net::TcpStream::connect(&address).await.unwrap());
            }
            let guesses = (0..10).map(|_| Manager::connect(&address, b"a guess").into_future());
            for guess in futures::future::join_all(guesses).await {
                assert_eq!(guess.unwrap_err().kind(), ErrorKind::Authentication);
            }
            assert_eq!(tally.call(Tally::add, (1,)).await.unwrap(), round, "who is in goes on");
        }
        drop(Manager::connect(&address, KEY).await.unwrap());
        let descriptors = || common::holdings_of(manager.pid()).descriptors;
        eventually("all strangers are let go", || descriptors() <= before.1).await;
        let grown = resident_bytes(manager.pid()).saturating_sub(before.0);
        assert!(grown < 16 << 20, "{grown} bytes");
        manager.shutdown().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn another_build_is_refused_by_both_ends() {
    within(async {
        let (manager, address) = start().await;
        // A client of another build: its number differs.
        let other = connect(&address, Some(KEY)).await.unwrap();
        other.send_bytes(&[&b"multiprocess mgr"[..], &7u64.to_le_bytes()].concat()).await.unwrap();
        assert!(other.recv_bytes().await.unwrap().starts_with(b"multiprocess mgr"));
        assert_eq!(other.recv_bytes().await.unwrap_err().kind(), ErrorKind::Closed);
        // One that is no client of a manager at all.
        let other = connect(&address, Some(KEY)).await.unwrap();
        other.send_bytes(b"hello").await.unwrap();
        assert_eq!(other.recv_bytes().await.unwrap_err().kind(), ErrorKind::Closed);
        // A manager of another build: what a true one says, with another number in it.
        let mirror = Listener::bind("127.0.0.1:0").authkey(KEY).await.unwrap();
        let (there, answered) = (mirror.local_addr(), async {
            let peer = mirror.accept().await.unwrap();
            let hello = peer.recv_bytes().await.unwrap();
            let true_one = connect(&address, Some(KEY)).await.unwrap();
            true_one.send_bytes(&hello).await.unwrap();
            let mut welcome = true_one.recv_bytes().await.unwrap();
            *welcome.last_mut().unwrap() ^= 1;
            peer.send_bytes(&welcome).await.unwrap();
        });
        let (connected, ()) = tokio::join!(Manager::connect(&there, KEY).into_future(), answered);
        let error = connected.unwrap_err();
        assert!(error.kind() == ErrorKind::Decode && error.to_string().contains("another build"), "{error}");
        // And what is no manager.
        let answered = async {
            let peer = mirror.accept().await.unwrap();
            peer.recv_bytes().await.unwrap();
            peer.send_bytes(b"hello").await.unwrap();
        };
        let (connected, ()) = tokio::join!(Manager::connect(&there, KEY).into_future(), answered);
        assert!(connected.unwrap_err().to_string().contains("no manager"));
        manager.shutdown().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn another_program_is_refused() {
    within(async {
        let manager = Manager::builder().bind("127.0.0.1:0").authkey(b"secret").start().await.unwrap();
        let words = manager.list::<String>().await.unwrap();
        manager.names().set("words", words.clone()).await.unwrap();
        let address = manager.address().await.unwrap().unwrap();
        // It knows the key, and would add a word to the list of a manager of its own build.
        let ended = tokio::task::spawn_blocking(move || {
            let other = programs::start(&programs::example("manager_remote"), [&address, "word"]);
            programs::finish(other, Duration::from_secs(15))
        });
        let ended = ended.await.unwrap();
        let said = String::from_utf8_lossy(&ended.stderr);
        assert!(!ended.status.success() && said.contains("another build"), "{said}");
        assert_eq!(words.len().await.unwrap(), 0);
        manager.shutdown().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn cont_03_cont_07_handles_travel_as_counted_references_that_nest() {
    within(async {
        let (manager, address) = start().await;
        let there = Manager::connect(&address, KEY).await.unwrap();
        let outer = there.dict::<String, ListProxy<u32>>().await.unwrap();
        {
            let inner = there.list().await.unwrap();
            inner.push(1).await.unwrap();
            // The handle goes before its request does.
            outer.insert("inner".into(), inner).await.unwrap();
        }
        let inner = outer.get("inner").await.unwrap().unwrap();
        outer.clear().await.unwrap();
        assert_eq!(inner.to_vec().await.unwrap(), [1]);
        assert_eq!(manager.object_count().await.unwrap(), 2);
        drop(inner);
        objects_go(&manager, 1).await;
        // Through the family to one from elsewhere, and back.
        let list = manager.list::<u32>().await.unwrap();
        manager.names().set("list", list.clone()).await.unwrap();
        let far: ListProxy<u32> = there.names().get("list").await.unwrap().unwrap();
        far.push(5).await.unwrap();
        outer.insert("list".into(), far).await.unwrap();
        there.names().set("dict", outer.clone()).await.unwrap();
        let dict: DictProxy<String, ListProxy<u32>> = manager.names().get("dict").await.unwrap().unwrap();
        assert!(dict.get("list").await.unwrap().unwrap().proxy().is_same_object(list.proxy()));
        // In a batch, where one reply is not looked at and one fails.
        let mut batch = outer.proxy().batch();
        batch.call(outer.proxy(), |dict: &mut HashMap<String, ListProxy<u32>>| dict.get("list").cloned(), ()).unwrap();
        let got = batch.call(outer.proxy(), |dict: &mut HashMap<String, ListProxy<u32>>| dict.remove("list"), ());
        let mut replies = batch.send().await.unwrap();
        let list_again = replies.take(got.unwrap()).unwrap().unwrap();
        assert_eq!(list_again.to_vec().await.unwrap(), [5]);
        drop((replies, list_again, list, dict));
        assert!(there.names().remove("list").await.unwrap() && there.names().remove("dict").await.unwrap());
        drop(outer);
        objects_go(&manager, 0).await;
        manager.shutdown().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn cont_08_shared_memory_cannot_be_sent_to_another_host() {
    within(async {
        let (manager, address) = start().await;
        let there = Manager::connect(&address, KEY).await.unwrap();
        let list = there.list::<Queue<u32>>().await.unwrap();
        let error = list.push(Queue::unbounded().unwrap()).await.unwrap_err();
        assert!(error.kind() == ErrorKind::Encode && error.to_string().contains("another host"), "{error}");
        manager.names().set("queue", Queue::<u32>::unbounded().unwrap()).await.unwrap();
        let error = there.names().get::<Queue<u32>>("queue").await.unwrap_err();
        assert!(error.kind() == ErrorKind::Encode && error.to_string().contains("another host"), "{error}");
        manager.names().set("file", Fd::new(std::fs::File::open("/dev/null").unwrap())).await.unwrap();
        assert!(there.names().get::<Fd<std::fs::File>>("file").await.is_err());
        // Nor does a handle go anywhere but to its manager.
        let other = Manager::start().await.unwrap();
        let nest = there.list::<ListProxy<u32>>().await.unwrap();
        let error = nest.push(other.list().await.unwrap()).await.unwrap_err();
        assert!(error.kind() == ErrorKind::Encode && error.to_string().contains("handle"), "{error}");
        let queue = Queue::unbounded().unwrap();
        let error = queue.put(there.list::<u32>().await.unwrap()).await.unwrap_err();
        assert!(error.kind() == ErrorKind::Encode && error.to_string().contains("connect"), "{error:?}");
        // And all of them still work.
        assert_eq!((nest.len().await.unwrap(), list.len().await.unwrap()), (0, 0));
        assert!(there.shutdown().await.unwrap_err().to_string().contains("started"));
        manager.shutdown().await.unwrap();
        other.shutdown().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn mgr_03_expose_restricts_clients_from_elsewhere() {
    within(async {
        let exposed = [Exposed::method(Tally::add), Exposed::namespace::<Proxy<Tally>>(), Exposed::maker(Tally::new)];
        let builder = Manager::builder().bind("127.0.0.1:0").authkey(KEY).expose(exposed);
        let manager = builder.start().await.unwrap();
        let tally = manager.create(Tally::new, (1,)).await.unwrap();
        manager.names().set("tally", tally).await.unwrap();
        let there = Manager::connect(&manager.address().await.unwrap().unwrap(), KEY).await.unwrap();
        let tally: Proxy<Tally> = there.names().get("tally").await.unwrap().unwrap();
        assert_eq!(tally.call(Tally::add, (1,)).await.unwrap(), 2);
        let error = tally.call(|tally: &mut Tally| tally.0, ()).await.unwrap_err();
        assert!(error.to_string().contains("not exposed"), "{error}");
        assert!(there.list::<u32>().await.unwrap_err().to_string().contains("not exposed"));
        assert!(there.names().get::<u32>("tally").await.unwrap_err().to_string().contains("not exposed"));
        manager.shutdown().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn rmgr_05_killed_manager_fails_every_pending_call_at_once() {
    let killed = async || {
        let (manager, address) = start().await;
        let there = Manager::connect(&address, KEY).await?;
        let tally = there.create(Tally::new, (0,)).await?;
        let calls = (0..100).map(|_| tally.call(Tally::add_slowly, (1, Duration::from_secs(100))));
        let mut calls = calls.collect::<futures::stream::FuturesUnordered<_>>();
        assert!(calls.next().now_or_never().is_none());
        there.object_count().await.unwrap();
        let start = Instant::now();
        kill(&manager);
        let mut failed = 0;
        while let Some(result) = calls.next().await {
            assert_eq!(result.unwrap_err().kind(), ErrorKind::Closed);
            failed += 1;
        }
        let took = start.elapsed();
        assert_eq!(failed, 100);
        assert_eq!(tally.call(Tally::add, (1,)).await.unwrap_err().kind(), ErrorKind::Closed);
        assert_eq!(there.list::<u32>().await.unwrap_err().kind(), ErrorKind::Closed);
        Ok(took)
    };
    within(common::rounds(killed, |took| *took < Duration::from_millis(100))).await.unwrap();
}

async fn hold_and_wait(address: String, count: usize, ready: Queue<usize>) {
    let manager = Manager::connect(&address, KEY).await.unwrap();
    let lists = futures::stream::iter(0..count).map(|_| manager.list::<u32>()).buffer_unordered(100);
    let held: Vec<_> = lists.try_collect().await.unwrap();
    ready.put(held.len()).await.unwrap();
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn p26_references_end_with_their_connection() {
    within(async {
        let (manager, address) = start().await;
        let ready = Queue::unbounded().unwrap();
        let child = Process::spawn(hold_and_wait, (address.clone(), 10_000, ready.clone())).unwrap();
        assert_eq!(ready.get().await.unwrap(), 10_000);
        assert_eq!(manager.object_count().await.unwrap(), 10_000);
        child.kill().unwrap();
        objects_go(&manager, 0).await;
        let there = Manager::connect(&address, KEY).await.unwrap();
        let list = there.list::<u32>().await.unwrap();
        drop(there);
        list.push(1).await.unwrap();
        drop(list);
        objects_go(&manager, 0).await;
        manager.shutdown().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn dropped_call_is_made_and_its_answers_references_are_released() {
    within(async {
        let (manager, address) = start().await;
        let there = Manager::connect(&address, KEY).await.unwrap();
        let tally = there.create(Tally::new, (0,)).await.unwrap();
        let lists = there.list::<ListProxy<u32>>().await.unwrap();
        lists.push(there.list().await.unwrap()).await.unwrap();
        for n in 0..500i64 {
            assert!(tally.call(Tally::add, (1,)).now_or_never().is_none());
            assert!(lists.to_vec().now_or_never().is_none());
            assert!(there.list::<u32>().now_or_never().is_none());
            assert_eq!(tally.call(|_: &mut Tally, n: i64| n, (n,)).await.unwrap(), n);
        }
        assert_eq!(tally.call(Tally::add, (0,)).await.unwrap(), 500);
        objects_go(&manager, 3).await;
        drop(lists);
        objects_go(&manager, 1).await;
        manager.shutdown().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn large_answers_wait_for_a_client_from_elsewhere_that_does_not_read() {
    within(async {
        let (manager, address) = start().await;
        let there = Manager::connect(&address, KEY).await.unwrap();
        let list = there.list::<Vec<u8>>().await.unwrap();
        let pushes = (0..40u8).map(|n| list.push(vec![n; 300_000]));
        futures::future::try_join_all(pushes).await.unwrap();
        let mut gets: Vec<_> = (0..40).map(|at| Box::pin(list.get(at))).collect();
        for get in &mut gets {
            let _ = get.now_or_never();
        }
        // The writer writes, and nobody reads for a while.
        tokio::task::yield_now().await;
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(manager.object_count().await.unwrap(), 1);
        for (n, get) in gets.into_iter().enumerate() {
            assert!(get.await.unwrap().unwrap() == vec![n as u8; 300_000]);
        }
        manager.shutdown().await.unwrap();
    })
    .await;
}

/// Changes a message of one end at random; how often it is left as it was is chance, too.
fn garble(message: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..random.below(4) {
        if message.is_empty() {
            return;
        }
        let at = random.below(message.len() as u64) as usize;
        match random.below(6) {
            0 => message[at] = random.next() as u8,
            1 => message[at] ^= 1 << random.below(8),
            2 => message.truncate(at),
            3 => message.extend_from_slice(&random.next().to_le_bytes()),
            4 => message[0] = random.below(14) as u8,
            _ => {
                let number = [0, 1, u64::MAX, 1 << 40, random.next()][random.below(5) as usize];
                let end = (at + 8).min(message.len());
                message[at..end].copy_from_slice(&number.to_le_bytes()[..end - at]);
            }
        }
    }
}

/// Passes messages on, and garbles them from number `from` on.
async fn pass_on(
    mut here: tokio::net::tcp::OwnedReadHalf,
    mut there: tokio::net::tcp::OwnedWriteHalf,
    from: u64,
    seed: u64,
) -> std::io::Result<()> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut random = Random::new(seed);
    for number in 0.. {
        let mut message = vec![0; here.read_u32().await? as usize];
        here.read_exact(&mut message).await?;
        if number >= from {
            garble(&mut message, &mut random);
        }
        there.write_u32(message.len() as u32).await?;
        there.write_all(&message).await?;
    }
    Ok(())
}

/// Between one client and the manager: requests are garbled from the one number on, answers from the other.
async fn relay(listener: tokio::net::TcpListener, to: String, (requests, answers): (u64, u64), seed: u64) {
    let (client, _) = listener.accept().await.unwrap();
    let manager = tokio::net::TcpStream::connect(to).await.unwrap();
    let ((from_client, to_client), (from_manager, to_manager)) = (client.into_split(), manager.into_split());
    // Whichever end is gone, both go.
    tokio::select! {
        _ = pass_on(from_client, to_manager, requests, seed) => {}
        _ = pass_on(from_manager, to_client, answers, seed) => {}
    }
}

/// What each round does through a relay that changes requests at random; whether it succeeds is chance.
async fn attack(address: &str, seed: u64) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let through = listener.local_addr().unwrap().to_string();
    // Of the handshake: a response, a challenge, a verdict; then the greeting and two true requests.
    let relay = tokio::spawn(relay(listener, address.to_string(), (6, u64::MAX), seed));
    let there = Manager::connect(&through, KEY).await.unwrap();
    let tally = there.create(Tally::new, (0,)).await.unwrap();
    let lists = there.list::<ListProxy<u32>>().await.unwrap();
    let patience = Duration::from_millis(20);
    for n in 0..30 {
        let _ = tokio::time::timeout(patience, tally.call(Tally::add, (n,))).await;
        let made = tokio::time::timeout(patience, there.list::<u32>()).await;
        if let Ok(Ok(list)) = made {
            let _ = tokio::time::timeout(patience, lists.push(list)).await;
        }
        let _ = tokio::time::timeout(patience, lists.to_vec()).await;
        let _ = tokio::time::timeout(patience, there.names().set("victim", n)).await;
        if tally.call(Tally::add, (0,)).now_or_never().is_some() {
            break; // The connection is lost: its calls fail at once.
        }
    }
    drop((lists, tally, there));
    relay.await.unwrap();
}

#[tokio::test]
async fn randomly_changed_requests_affect_their_client_only() {
    within(async {
        let (manager, address) = start().await;
        let witness = Manager::connect(&address, KEY).await.unwrap();
        let tally = witness.create(Tally::new, (0,)).await.unwrap();
        let start = Instant::now();
        let mut seed = 0;
        while start.elapsed() < Duration::from_secs(4) || seed < 8 {
            let attacks = (0..4).map(|n| attack(&address, seed + n));
            futures::future::join_all(attacks).await;
            seed += 4;
            let total = tally.call(|_: &mut Tally| 77, ()).await.unwrap();
            assert_eq!(total, 77);
        }
        assert!(seed >= 8, "{seed} attacks only");
        assert!(mp::active_children().iter().any(|child| child.pid() == manager.pid()));
        let _ = witness.names().remove("victim").await;
        drop((tally, witness));
        // Whatever was claimed under false numbers went with its connection.
        objects_go(&manager, 0).await;
        manager.shutdown().await.unwrap();
    })
    .await;
}

/// A client whose answers are garbled. Whether a call succeeds is chance: none panics, or waits for a connection that
/// is lost.
async fn be_lied_to(address: String, first: u64, done: Queue<u64>) {
    std::panic::set_hook(Box::new(|info| {
        eprintln!("{info}");
        std::process::abort();
    }));
    let (start, before, patience) = (Instant::now(), resident_bytes(std::process::id()), Duration::from_millis(20));
    let mut seed = first;
    // On a slow machine until there were enough.
    while start.elapsed() < Duration::from_secs(3) || seed < first + 10 {
        seed += 1;
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let through = listener.local_addr().unwrap().to_string();
        // Of the handshake: a challenge, a verdict, a response; then the greeting, which every third one gets garbled.
        let from = if seed.is_multiple_of(3) { 3 } else { 4 + seed % 4 };
        let relay = tokio::spawn(relay(listener, address.clone(), (u64::MAX, from), seed));
        let connecting = Manager::connect(&through, KEY).into_future();
        if let Ok(Ok(there)) = tokio::time::timeout(Duration::from_secs(1), connecting).await {
            let lie = |call| tokio::time::timeout(patience, call);
            let calls = async {
                let list = there.list::<ListProxy<String>>().await?;
                let (inner, value) = (there.list::<String>().await?, there.value(7u64).await?);
                for n in 0..10 {
                    inner.push(n.to_string()).await?;
                    list.push(inner.clone()).await?;
                    let nested = list.get(0).await?;
                    nested.unwrap_or(inner.clone()).to_vec().await?;
                    value.fetch_add(n).await?;
                    let mut batch = value_batch(&inner)?;
                    let (len, mut replies) = (batch.1, batch.0.send().await?);
                    replies.take(len)?;
                    there.names().get::<String>("nothing").await?;
                    batch = value_batch(&inner)?;
                    drop(batch);
                }
                let queue = there.queue::<Vec<u8>>(None).await?;
                queue.put(vec![1; 1000]).await?;
                queue.get().await?;
                drop(there.lock().await?.acquire().await?);
                Ok::<_, mp::Error>(())
            };
            let _ = lie(Box::pin(calls)).await;
            if there.object_count().now_or_never().is_none() {
                let _ = tokio::time::timeout(patience, there.object_count()).await;
            }
        }
        let _ = tokio::time::timeout(Duration::from_secs(5), relay).await.expect("both ends are gone");
    }
    let grown = resident_bytes(std::process::id()).saturating_sub(before);
    assert!(grown < 64 << 20, "{grown} bytes");
    done.put(seed - first).await.unwrap();
}

/// A batch, and the ticket of its call.
fn value_batch(list: &ListProxy<String>) -> mp::Result<(mp::Batch, mp::Ticket<usize>)> {
    let mut batch = list.proxy().batch();
    let len = batch.call(list.proxy(), |list: &mut Vec<String>| list.len(), ())?;
    Ok((batch, len))
}

#[tokio::test]
async fn randomly_changed_answers_are_errors() {
    within(async {
        let (manager, address) = start().await;
        let done = Queue::unbounded().unwrap();
        let clients = (0..2).map(|n| Process::spawn(be_lied_to, (address.clone(), n << 32, done.clone())).unwrap());
        for client in futures::future::join_all(clients).await {
            client.unwrap();
        }
        let rounds = done.get().await.unwrap() + done.get().await.unwrap();
        assert!(rounds >= 20, "{rounds} rounds only");
        objects_go(&manager, 0).await;
        manager.shutdown().await.unwrap();
    })
    .await;
}

/// A manager, a connection to it, and the names of it for children.
async fn connected() -> (Manager, String, Manager) {
    let (manager, address) = start().await;
    let there = Manager::connect(&address, KEY).await.unwrap();
    (manager, address, there)
}

/// What a child finds under `name`.
async fn found<T>(address: &str, name: &str) -> (Manager, T)
where
    T: serde::Serialize + serde::de::DeserializeOwned + Send + 'static,
{
    let manager = Manager::connect(address, KEY).await.unwrap();
    let thing = manager.names().get(name).await.unwrap().unwrap();
    (manager, thing)
}

async fn see_and_clear(address: String) {
    let (_manager, event) = found::<mp::EventProxy>(&address, "event").await;
    event.wait().await.unwrap();
    event.clear().await.unwrap();
}

#[tokio::test]
async fn smtypes_01_child_sees_and_clears_an_event() {
    within(async {
        let (manager, address, there) = connected().await;
        let event = there.event().await.unwrap();
        there.names().set("event", event.clone()).await.unwrap();
        let child = Process::spawn(see_and_clear, (address,)).unwrap();
        // Set and cleared at once it wakes the waiters.
        let waits = event.wait();
        let mut waits = Box::pin(waits);
        assert!((&mut waits).now_or_never().is_none());
        there.object_count().await.unwrap();
        event.set().await.unwrap();
        waits.await.unwrap();
        child.await.unwrap();
        assert!(!event.is_set().await.unwrap());
        // A dropped wait leaves nothing behind.
        assert!(tokio::time::timeout(Duration::from_millis(5), event.wait()).await.is_err());
        manager.shutdown().await.unwrap();
    })
    .await;
}

async fn hold_lock(address: String, ready: Queue<()>, go_on: Queue<()>) {
    let (_manager, lock) = found::<mp::LockProxy>(&address, "lock").await;
    let held = lock.acquire().await.unwrap();
    ready.put(()).await.unwrap();
    go_on.get().await.unwrap();
    drop(held);
}

#[tokio::test]
async fn smtypes_02_lock_is_free_once_its_holder_releases_it_or_is_killed() {
    within(async {
        let (manager, address, there) = connected().await;
        let lock = there.lock().await.unwrap();
        there.names().set("lock", lock.clone()).await.unwrap();
        let (ready, go_on) = (Queue::unbounded().unwrap(), Queue::unbounded().unwrap());
        let child = Process::spawn(hold_lock, (address.clone(), ready.clone(), go_on.clone())).unwrap();
        ready.get().await.unwrap();
        assert_eq!(lock.try_acquire().await.unwrap_err().kind(), ErrorKind::WouldBlock);
        // A dropped acquire does not get it.
        assert!(tokio::time::timeout(Duration::from_millis(5), lock.acquire()).await.is_err());
        let mut waits = Box::pin(lock.acquire());
        assert!((&mut waits).now_or_never().is_none());
        go_on.put(()).await.unwrap();
        drop(waits.await.unwrap());
        child.await.unwrap();
        drop(lock.acquire().await.unwrap());
        let child = Process::spawn(hold_lock, (address, ready.clone(), go_on)).unwrap();
        ready.get().await.unwrap();
        let mut waits = Box::pin(lock.acquire());
        assert!((&mut waits).now_or_never().is_none());
        there.object_count().await.unwrap();
        child.kill().unwrap();
        let error = waits.await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OwnerDied);
        let held = error.into_guard();
        assert_eq!(lock.try_acquire().await.unwrap_err().kind(), ErrorKind::WouldBlock);
        drop(held);
        drop(lock.try_acquire().await.unwrap());
        manager.shutdown().await.unwrap();
    })
    .await;
}

async fn take_permit(address: String, ready: Queue<()>) {
    let (_manager, seats) = found::<mp::SemaphoreProxy>(&address, "seats").await;
    let _permit = seats.acquire().await.unwrap();
    ready.put(()).await.unwrap();
    std::future::pending::<()>().await;
}

async fn notice(address: String) {
    let (_manager, condition) = found::<mp::ConditionProxy>(&address, "condition").await;
    let _held = condition.lock().await.unwrap();
    condition.notify_one().await.unwrap();
}

#[tokio::test]
async fn smtypes_03_semaphores_and_conditions_are_usable_from_a_child() {
    within(async {
        let (manager, address, there) = connected().await;
        let (seats, ready) = (there.semaphore(2).await.unwrap(), Queue::unbounded().unwrap());
        there.names().set("seats", seats.clone()).await.unwrap();
        let child = Process::spawn(take_permit, (address.clone(), ready.clone())).unwrap();
        ready.get().await.unwrap();
        let one = seats.acquire().await.unwrap();
        assert_eq!(seats.try_acquire().await.unwrap_err().kind(), ErrorKind::WouldBlock);
        // Dropped at every point of its way, an acquire loses no permit.
        for _ in 0..200 {
            let mut waits = Box::pin(seats.acquire());
            assert!((&mut waits).now_or_never().is_none());
            drop(waits);
        }
        let mut waits = Box::pin(seats.acquire());
        assert!((&mut waits).now_or_never().is_none());
        there.object_count().await.unwrap();
        child.kill().unwrap();
        let two = waits.await.unwrap();
        assert_eq!(seats.available().await.unwrap(), 0);
        two.forget();
        drop(one);
        assert_eq!(seats.available().await.unwrap(), 1);
        seats.release().await.unwrap();
        assert_eq!(seats.available().await.unwrap(), 2);

        let condition = there.condition().await.unwrap();
        there.names().set("condition", condition.clone()).await.unwrap();
        let held = condition.lock().await.unwrap();
        let child = Process::spawn(notice, (address,)).unwrap();
        let held = condition.wait(held).await.unwrap();
        child.await.unwrap();
        // A wait that is dropped leaves the lock free and no waiter behind.
        assert!(tokio::time::timeout(Duration::from_millis(5), condition.wait(held)).await.is_err());
        let held = condition.lock().await.unwrap();
        assert_eq!(condition.waiting().await.unwrap(), 0);
        let other = there.condition().await.unwrap();
        assert!(other.wait(held).await.is_err(), "another condition's lock is none");
        drop(condition.lock().await.unwrap());
        manager.shutdown().await.unwrap();
    })
    .await;
}

async fn reset_and_wait(address: String) -> usize {
    let (_manager, barrier) = found::<mp::BarrierProxy>(&address, "barrier").await;
    assert!(barrier.is_broken().await.unwrap());
    barrier.reset().await.unwrap();
    barrier.wait().await.unwrap()
}

#[tokio::test]
async fn smtypes_04_barrier_breaks_by_a_dropped_wait_and_is_reset_by_a_child() {
    within(async {
        let (manager, address, there) = connected().await;
        let barrier = there.barrier(2).await.unwrap();
        there.names().set("barrier", barrier.clone()).await.unwrap();
        assert_eq!(barrier.parties().await.unwrap(), 2);
        assert!(tokio::time::timeout(Duration::from_millis(5), barrier.wait()).await.is_err());
        assert_eq!(barrier.wait().await.unwrap_err().kind(), ErrorKind::BrokenBarrier);
        let child = Process::spawn(reset_and_wait, (address,)).unwrap();
        while barrier.is_broken().await.unwrap() {
            tokio::task::yield_now().await;
        }
        let index = barrier.wait().await.unwrap();
        assert_eq!(index + child.await.unwrap(), 1);
        let mut waits = Box::pin(barrier.wait());
        assert!((&mut waits).now_or_never().is_none());
        while barrier.waiting().await.unwrap() == 0 {}
        barrier.abort().await.unwrap();
        assert_eq!(waits.await.unwrap_err().kind(), ErrorKind::BrokenBarrier);
        manager.shutdown().await.unwrap();
    })
    .await;
}

async fn agree_on_the_queue(address: String) {
    let (_manager, queue) = found::<mp::QueueProxy<String>>(&address, "queue").await;
    assert!(queue.is_full().await.unwrap());
    assert_eq!(queue.len().await.unwrap(), 2);
    for item in ["one", "two", "three"] {
        assert_eq!(queue.get().await.unwrap(), item);
        queue.task_done().await.unwrap();
    }
}

#[tokio::test]
async fn smtypes_06_queue_is_shared_and_can_be_joined() {
    within(async {
        let (manager, address, there) = connected().await;
        let queue = there.queue::<String>(2).await.unwrap();
        there.names().set("queue", queue.clone()).await.unwrap();
        assert_eq!(queue.try_get().await.unwrap_err().kind(), ErrorKind::Empty);
        queue.put("one".into()).await.unwrap();
        queue.put("two".into()).await.unwrap();
        assert_eq!(queue.try_put("three".into()).await.unwrap_err().kind(), ErrorKind::Full);
        // Dropped while it waits, it has not put.
        assert!(tokio::time::timeout(Duration::from_millis(5), queue.put("never".into())).await.is_err());
        let child = Process::spawn(agree_on_the_queue, (address,));
        let mut put = Box::pin(queue.put("three".into()));
        put.as_mut().await.unwrap();
        queue.join().await.unwrap();
        child.unwrap().await.unwrap();
        assert!(queue.is_empty().await.unwrap() && queue.task_done().await.is_err());
        let mut waits = Box::pin(queue.get());
        assert!((&mut waits).now_or_never().is_none());
        queue.close().await.unwrap();
        assert_eq!(waits.await.unwrap_err().kind(), ErrorKind::Closed);
        assert_eq!(queue.put("late".into()).await.unwrap_err().kind(), ErrorKind::Closed);
        manager.shutdown().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn smtypes_07_values_and_arrays() {
    within(async {
        let (manager, _, there) = connected().await;
        let value = there.value("a".to_string()).await.unwrap();
        value.update(|text| text.push('b')).await.unwrap();
        assert_eq!(value.swap("c".into()).await.unwrap(), "ab");
        value.set("d".into()).await.unwrap();
        assert_eq!(value.get().await.unwrap(), "d");
        let array = there.array(vec![0.5f64, 1.5]).await.unwrap();
        array.set(1, 2.5).await.unwrap();
        assert!(array.set(2, 0.0).await.unwrap_err().to_string().contains("2 elements"));
        assert_eq!((array.get(1).await.unwrap(), array.get(2).await.unwrap()), (Some(2.5), None));
        assert_eq!((array.len().await.unwrap(), array.to_vec().await.unwrap()), (2, vec![0.5, 2.5]));
        manager.shutdown().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn dropped_get_loses_no_item_and_keeps_the_order() {
    within(async {
        let (manager, _, there) = connected().await;
        // Through pipes and through a socket.
        for queue in [manager.queue::<u32>(None).await.unwrap(), there.queue::<u32>(None).await.unwrap()] {
            let (mut random, mut next, mut expected) = (Random::new(3), 0, 0);
            for _ in 0..1_000 {
                if random.below(2) == 0 {
                    queue.put(next).await.unwrap();
                    next += 1;
                }
                let get = queue.get();
                let patience = Duration::from_micros(random.below(300));
                if let Ok(got) = tokio::time::timeout(patience, get).await {
                    assert_eq!(got.unwrap(), expected);
                    expected += 1;
                }
            }
            queue.close().await.unwrap();
            while let Ok(got) = queue.get().await {
                assert_eq!(got, expected);
                expected += 1;
            }
            assert_eq!(expected, next);
        }
        manager.shutdown().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn smtypes_waits_with_a_timeout_end_in_time_and_leave_nothing_behind() {
    within(async {
        let (manager, _, there) = connected().await;
        let (short, long) = (Duration::from_millis(5), Duration::from_secs(20));
        let queue = there.queue::<u32>(1).await.unwrap();
        assert_eq!(queue.get_timeout(short).await.unwrap_err().kind(), ErrorKind::Timeout);
        queue.put_timeout(1, long).await.unwrap();
        assert_eq!(queue.put_timeout(2, short).await.unwrap_err().kind(), ErrorKind::Timeout);
        assert_eq!((queue.get_timeout(long).await.unwrap(), queue.len().await.unwrap()), (1, 0));
        let lock = there.lock().await.unwrap();
        let held = lock.acquire_timeout(long).await.unwrap();
        assert_eq!(lock.acquire_timeout(short).await.unwrap_err().kind(), ErrorKind::Timeout);
        drop(held);
        drop(lock.try_acquire().await.unwrap());
        let seats = there.semaphore(1).await.unwrap();
        let permit = seats.acquire_timeout(long).await.unwrap();
        assert_eq!(seats.acquire_timeout(short).await.unwrap_err().kind(), ErrorKind::Timeout);
        drop(permit);
        assert_eq!(seats.available().await.unwrap(), 1);
        let event = there.event().await.unwrap();
        assert_eq!(event.wait_timeout(short).await.unwrap_err().kind(), ErrorKind::Timeout);
        event.set().await.unwrap();
        event.wait_timeout(long).await.unwrap();
        let barrier = there.barrier(2).await.unwrap();
        assert_eq!(barrier.wait_timeout(short).await.unwrap_err().kind(), ErrorKind::Timeout);
        assert!(barrier.is_broken().await.unwrap());
        let condition = there.condition().await.unwrap();
        let held = condition.lock().await.unwrap();
        let error = condition.wait_timeout(held, short).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Timeout);
        assert_eq!(condition.waiting().await.unwrap(), 0);
        // The lock is held again.
        let held = error.into_guard();
        assert!(tokio::time::timeout(short, condition.lock()).await.is_err());
        let count = there.value(0).await.unwrap();
        let changed = async || Ok(count.get().await? == 3);
        let notify = async {
            for _ in 0..3 {
                let _held = condition.lock().await.unwrap();
                count.fetch_add(1).await.unwrap();
                condition.notify_one().await.unwrap();
            }
        };
        let (held, ()) = futures::join!(condition.wait_for(held, changed), notify);
        assert_eq!(count.get().await.unwrap(), 3);
        drop(held.unwrap());
        manager.shutdown().await.unwrap();
    })
    .await;
}

/// Lets `asks` be sent while the manager stands still, and be answered, but not read.
async fn asked_unread<F: Future>(manager: &Manager, there: &Manager, asks: F) -> std::pin::Pin<Box<F>> {
    let mut asks = Box::pin(asks);
    stop(manager.pid());
    assert!((&mut asks).now_or_never().is_none());
    go_on(manager.pid());
    // What comes after it is answered after it.
    there.object_count().await.unwrap();
    asks
}

async fn hold_and_sit(address: String, ready: Queue<()>) {
    let (there, lock) = found::<mp::LockProxy>(&address, "lock").await;
    let seats: mp::SemaphoreProxy = there.names().get("seats").await.unwrap().unwrap();
    let _held = (lock.acquire().await.unwrap(), seats.acquire().await.unwrap());
    ready.put(()).await.unwrap();
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn unread_result_of_dropped_wait_goes_back_as_if_never_taken() {
    within(async {
        let (manager, address, there) = connected().await;
        // Through pipes and through a socket.
        for one in [&manager, &there] {
            let queue = one.queue::<u32>(None).await.unwrap();
            queue.put(1).await.unwrap();
            queue.put(2).await.unwrap();
            let get = asked_unread(&manager, one, queue.get()).await;
            assert_eq!(queue.len().await.unwrap(), 1);
            drop(get);
            assert_eq!((queue.get().await.unwrap(), queue.get().await.unwrap()), (1, 2));

            let seats = one.semaphore(1).await.unwrap();
            let acquire = asked_unread(&manager, one, seats.acquire()).await;
            assert_eq!(seats.available().await.unwrap(), 0);
            drop(acquire);
            drop(seats.try_acquire().await.unwrap());

            let condition = one.condition().await.unwrap();
            let first = condition.wait(condition.lock().await.unwrap());
            let first = asked_unread(&manager, one, first).await;
            let second = condition.wait(condition.lock().await.unwrap());
            let second = asked_unread(&manager, one, second).await;
            assert_eq!(condition.waiting().await.unwrap(), 2);
            condition.notify_one().await.unwrap();
            assert_eq!(condition.waiting().await.unwrap(), 1, "the first has the lock and has not read it");
            drop(first);
            drop(second.await.unwrap());

            let (lock, seats) = (one.lock().await.unwrap(), one.semaphore(1).await.unwrap());
            there.names().remove("lock").await.unwrap();
            one.names().set("lock", lock.clone()).await.unwrap();
            one.names().set("seats", seats.clone()).await.unwrap();
            let ready = Queue::unbounded().unwrap();
            let child = Process::spawn(hold_and_sit, (address.clone(), ready.clone())).unwrap();
            ready.get().await.unwrap();
            let acquire = asked_unread(&manager, one, lock.acquire()).await;
            child.kill().unwrap();
            drop(seats.acquire().await.unwrap());
            one.object_count().await.unwrap();
            drop(acquire);
            let told = lock.acquire().await.unwrap_err();
            assert_eq!(told.kind(), ErrorKind::OwnerDied);
            drop(told.into_guard());
            drop(lock.acquire().await.unwrap());
        }
        manager.shutdown().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn wait_with_timeout_reports_its_outcome() {
    within(async {
        let (manager, _, there) = connected().await;
        for one in [&manager, &there] {
            let (queue, barrier) = (one.queue::<u32>(1).await.unwrap(), one.barrier(2).await.unwrap());
            let condition = one.condition().await.unwrap();
            let held = condition.lock().await.unwrap();
            let short = Duration::from_millis(5);
            stop(manager.pid());
            // The time is over while the manager stands still: only it knows what came first.
            let asks = async {
                let puts = async { futures::join!(queue.put_timeout(1, short), queue.put_timeout(2, short)) };
                let waits = async { futures::join!(barrier.wait_timeout(short), barrier.wait_timeout(short)) };
                let noticed = async { futures::join!(condition.wait_timeout(held, short), condition.notify_one()) };
                futures::join!(puts, waits, noticed)
            };
            let later = async {
                tokio::time::sleep(4 * short).await;
                go_on(manager.pid());
            };
            let ((puts, waits, noticed), ()) = futures::join!(asks, later);
            puts.0.unwrap();
            assert_eq!(puts.1.unwrap_err().kind(), ErrorKind::Timeout);
            assert_eq!((queue.get().await.unwrap(), queue.len().await.unwrap()), (1, 0));
            assert_eq!(waits.0.unwrap() + waits.1.unwrap(), 1);
            noticed.1.unwrap();
            drop(noticed.0.unwrap());
            drop(condition.lock().await.unwrap());
        }
        manager.shutdown().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn answer_left_by_a_former_leader_is_sent() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let (mut calls, done) = (Vec::new(), Queue::unbounded().unwrap());
        for _ in 0..4 {
            let (tally, done) = (manager.create(Tally::new, (0,)).await.unwrap(), done.clone());
            let call = async move { tally.call(Tally::fill_slowly, (4 << 20, done)).await.unwrap().len() };
            calls.push(Box::pin(call));
        }
        calls.iter_mut().for_each(|call| assert!(call.now_or_never().is_none()));
        // Nobody reads while all are done: their answers find the pipe full, when another thread sleeps on the runtime.
        let start = Instant::now();
        for _ in 0..4 {
            while done.try_get().is_err() {
                assert!(start.elapsed() < Duration::from_secs(10));
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        assert_eq!(futures::future::join_all(calls).await, [4 << 20; 4]);
        manager.shutdown().await.unwrap();
    })
    .await;
}

async fn get_without_end(address: String) {
    let (_manager, queue) = found::<mp::QueueProxy<u32>>(&address, "queue").await;
    let gets = (0..10).map(|_| queue.get());
    futures::future::join_all(gets).await;
}

#[tokio::test]
async fn killed_getter_takes_no_item_and_many_waiters_need_no_thread() {
    within(async {
        let (manager, address, there) = connected().await;
        let queue = there.queue::<u32>(None).await.unwrap();
        there.names().set("queue", queue.clone()).await.unwrap();
        let threads_of_manager = || std::fs::read_dir(format!("/proc/{}/task", manager.pid())).unwrap().count();
        let before = threads_of_manager();
        let child = Process::spawn(get_without_end, (address,)).unwrap();
        let mut gets: Vec<_> = (0..200).map(|_| Box::pin(queue.get())).collect();
        gets.iter_mut().for_each(|get| assert!(get.now_or_never().is_none()));
        there.object_count().await.unwrap();
        // By the number of CPUs it has some anyhow.
        let threads = threads_of_manager();
        assert!(threads <= before + 2, "{before} threads, and {threads} with 200 waiters");
        let pid = child.pid();
        child.kill().unwrap();
        eventually("it is gone", || mp::active_children().iter().all(|one| one.pid() != pid)).await;
        // The manager hears of its end by its socket; asked often enough, it has.
        for _ in 0..100 {
            there.object_count().await.unwrap();
        }
        for n in 0..200 {
            queue.put(n).await.unwrap();
        }
        for (n, get) in gets.into_iter().enumerate() {
            assert_eq!(get.await.unwrap(), n as u32);
        }
        manager.shutdown().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn lost_connection_fails_pending_waits() {
    within(async {
        let (manager, _, there) = connected().await;
        let (queue, lock) = (there.queue::<u32>(None).await.unwrap(), there.lock().await.unwrap());
        let held = lock.acquire().await.unwrap();
        let waits = async { tokio::join!(queue.get(), lock.acquire()) };
        let killed = async {
            there.object_count().await.unwrap();
            kill(&manager);
        };
        let ((item, again), ()) = tokio::join!(waits, killed);
        assert_eq!((item.unwrap_err().kind(), again.unwrap_err().kind()), (ErrorKind::Closed, ErrorKind::Closed));
        drop(held);
    })
    .await;
}

#[test]
fn call_of_an_ended_runtime_fails_or_goes_on_in_another() {
    let runtime = || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let first = runtime();
    let (mut process, manager, list, far, client, server) = first.block_on(async {
        let process = Process::spawn(|| 7, ()).unwrap();
        let (manager, address) = start().await;
        let list = manager.list::<u32>().await.unwrap();
        let far = Manager::connect(&address, KEY).await.unwrap();
        let listener = Listener::bind("127.0.0.1:0").authkey(KEY).await.unwrap();
        let address = listener.local_addr();
        let client = async { connect(&address, Some(KEY)).await.unwrap() };
        let (client, server) = tokio::join!(client, listener.accept());
        (process, manager, list, far, client, server.unwrap())
    });
    drop(first);
    runtime().block_on(async {
        assert_eq!(within(process.join()).await.unwrap(), 7);
        within(list.push(5)).await.unwrap();
        assert_eq!(within(list.to_vec()).await.unwrap(), [5]);
        let ended = [
            within(far.object_count()).await.map(drop),
            within(client.send_bytes(b"there")).await,
            within(server.recv_bytes()).await.map(drop),
        ];
        for ended in ended {
            let error = ended.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
            assert!(error.to_string().contains("its runtime has ended"), "{error}");
        }
        within(manager.shutdown()).await.unwrap();
    });
}
