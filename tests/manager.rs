//! Managers: objects of one process that many use. Names begin with the row of the reference suite.

mod common;

use common::{eventually, go_on, in_child, objects_go, stop, within};
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, TryStreamExt};
use multiprocess::{
    self as mp, Batch, DictProxy, ErrorKind, Exposed, ListProxy, Manager, Namespace, Process, Proxy, Queue,
};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::task::{Context, Wake, Waker};
use std::time::{Duration, Instant};

mp::test_support!();
common::quiet::quiet_stderr!();

/// Not a serde value, and not `Clone`.
struct Tally {
    total: i64,
    _thread: Option<std::thread::JoinHandle<()>>,
}

impl Tally {
    fn new(total: i64) -> Self {
        Self { total, _thread: None }
    }

    fn add(&mut self, n: i64) -> i64 {
        self.total += n;
        self.total
    }

    fn add_when_told(&mut self, n: i64, go: Queue<()>) -> i64 {
        go.blocking_get().unwrap();
        self.add(n)
    }

    fn total(&mut self) -> i64 {
        self.total
    }

    fn add_slowly(&mut self, n: i64, pause: Duration) -> i64 {
        let seen = self.total;
        std::thread::sleep(pause);
        self.total = seen + n;
        self.total
    }

    fn fail(&mut self, why: String) -> i64 {
        self.total += 1;
        panic!("{why}")
    }

    fn refuse(&mut self, n: i64) -> mp::Result<i64> {
        if n < 0 { Err(mp::Error::other("negative")) } else { Ok(n) }
    }
}

#[tokio::test]
async fn mgr_01_custom_object_is_created_and_called_until_shutdown() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let tally = manager.create(Tally::new, (10,)).await.unwrap();
        assert_eq!(tally.call(Tally::add, (5,)).await.unwrap(), 15);
        assert_eq!(tally.call(|tally: &mut Tally| tally.total * 2, ()).await.unwrap(), 30);
        let pid = manager.pid();
        assert!(mp::active_children().iter().any(|child| child.pid() == pid && child.name() == "Manager"));
        manager.shutdown().await.unwrap();
        assert!(mp::active_children().iter().all(|child| child.pid() != pid));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mgr_01_on_a_runtime_of_several_threads() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let tally = manager.create(Tally::new, (0,)).await.unwrap();
        let adds = (0..200).map(|_| {
            let tally = tally.clone();
            tokio::spawn(async move { tally.call(Tally::add, (1,)).await })
        });
        for add in adds.collect::<Vec<_>>() {
            add.await.unwrap().unwrap();
        }
        assert_eq!(tally.call(Tally::total, ()).await.unwrap(), 200);
        manager.shutdown().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn cont_01_list_has_the_operations_of_a_vec() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let list = manager.list::<i64>().await.unwrap();
        list.extend((0..10).collect()).await.unwrap();
        assert_eq!(list.slice(2, 3).await.unwrap(), [2, 3, 4]);
        assert_eq!(list.slice(8, 100).await.unwrap(), [8, 9]);
        assert!(list.slice(50, 1).await.unwrap().is_empty());
        list.push(10).await.unwrap();
        assert_eq!(list.get(10).await.unwrap(), Some(10));
        assert_eq!(list.get(11).await.unwrap(), None);
        list.set(0, -1).await.unwrap();
        list.insert(1, 100).await.unwrap();
        assert_eq!(list.remove(1).await.unwrap(), 100);
        assert_eq!(list.pop().await.unwrap(), Some(10));
        for error in [
            list.set(10, 0).await.unwrap_err(),
            list.insert(11, 0).await.unwrap_err(),
            list.remove(10).await.unwrap_err(),
        ] {
            assert!(error.to_string().contains("10 elements"), "{error}");
        }
        list.update(|list| list.reverse()).await.unwrap();
        list.sort().await.unwrap();
        assert_eq!(list.to_vec().await.unwrap(), [-1, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
        let outer = manager.list::<ListProxy<i64>>().await.unwrap();
        outer.push(list.clone()).await.unwrap();
        list.push(77).await.unwrap();
        assert_eq!(outer.get(0).await.unwrap().unwrap().pop().await.unwrap(), Some(77));
        list.clear().await.unwrap();
        assert!(list.is_empty().await.unwrap());
        manager.shutdown().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn cont_02_stream_of_a_list_yields_elements_pushed_meanwhile() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let list = manager.list::<u32>().await.unwrap();
        list.extend((0..1000).collect()).await.unwrap();
        let mut stream = Box::pin(list.stream());
        assert_eq!(stream.next().await.unwrap().unwrap(), 0);
        list.push(1000).await.unwrap();
        assert_eq!(stream.try_collect::<Vec<_>>().await.unwrap(), (1..=1000).collect::<Vec<_>>());
        assert_eq!(manager.list::<u32>().await.unwrap().stream().count().await, 0);
        manager.shutdown().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn cont_03_lists_in_a_list_are_references() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let outer = manager.list::<ListProxy<u32>>().await.unwrap();
        for _ in 0..3 {
            outer.push(manager.list().await.unwrap()).await.unwrap();
        }
        outer.get(1).await.unwrap().unwrap().push(5).await.unwrap();
        let inner = outer.to_vec().await.unwrap();
        assert_eq!(inner[1].to_vec().await.unwrap(), [5]);
        assert!(inner[0].is_empty().await.unwrap());
        assert!(inner[1].proxy().is_same_object(outer.get(1).await.unwrap().unwrap().proxy()));
        drop((inner, outer));
        objects_go(&manager, 0).await;
        manager.shutdown().await.unwrap();
    })
    .await;
}

/// A list of lists of itself.
#[derive(Clone, Serialize, Deserialize)]
struct Nest(ListProxy<Nest>);

#[tokio::test]
async fn cont_04_list_that_contains_itself_is_dropped_with_its_last_holder() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let nest = Nest(manager.list().await.unwrap());
        nest.0.push(nest.clone()).await.unwrap();
        let other = Nest(manager.list().await.unwrap());
        other.0.push(nest.clone()).await.unwrap();
        nest.0.push(other.clone()).await.unwrap();
        drop(nest);
        let found = other.0.get(0).await.unwrap().unwrap();
        assert_eq!(found.0.len().await.unwrap(), 2);
        drop((found, other));
        objects_go(&manager, 0).await;
        manager.shutdown().await.unwrap();
    })
    .await;
}

/// What a list that it is in was made with.
struct Node {
    list: ListProxy<Proxy<Node>>,
    gone: Option<Queue<()>>,
}

impl Node {
    fn new(list: ListProxy<Proxy<Node>>, gone: Queue<()>) -> Self {
        Self { list, gone: Some(gone) }
    }

    fn list(&mut self) -> ListProxy<Proxy<Node>> {
        self.list.clone()
    }

    fn work(&mut self, begun: Queue<()>, go_on: Queue<()>) {
        begun.blocking_put(()).unwrap();
        go_on.blocking_get().unwrap();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.gone.take().unwrap().blocking_put(()).unwrap();
    }
}

#[tokio::test]
async fn cont_04_object_is_dropped_with_the_list_it_holds_and_is_in() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let (list, gone) = (manager.list().await.unwrap(), Queue::unbounded().unwrap());
        let node = manager.create(Node::new, (list.clone(), gone.clone())).await.unwrap();
        list.push(node.clone()).await.unwrap();
        drop(list);
        assert_eq!(node.call(Node::list, ()).await.unwrap().len().await.unwrap(), 1);
        drop(node);
        gone.get().await.unwrap();
        objects_go(&manager, 0).await;
        manager.shutdown().await.unwrap();
    })
    .await;
}

/// Waits until no thread of a process runs for a while.
async fn comes_to_rest(pid: u32) {
    let wakes = |task: std::io::Result<std::fs::DirEntry>| {
        let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap_or_default();
        let switches = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        switches.map_or(0, |switches| switches.trim().parse::<u64>().unwrap())
    };
    let all = || std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().map(wakes).sum::<u64>();
    let (mut before, mut now) = (u64::MAX, all());
    while before != now {
        tokio::time::sleep(Duration::from_millis(60)).await;
        (before, now) = (now, all());
    }
}

#[tokio::test]
async fn idle_manager_never_wakes_and_still_collects_circles_left_by_a_call() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let (list, queues) = (manager.list().await.unwrap(), [(); 3].map(|()| Queue::unbounded().unwrap()));
        let [begun, go_on, gone] = queues;
        let node = manager.create(Node::new, (list.clone(), gone.clone())).await.unwrap();
        list.push(node.clone()).await.unwrap();
        let mut call = Box::pin(node.call(Node::work, (begun.clone(), go_on.clone())));
        assert!((&mut call).now_or_never().is_none());
        begun.get().await.unwrap();
        drop(call);
        drop((node, list));
        // Only the call holds the circle now, for long.
        comes_to_rest(manager.pid()).await;
        go_on.put(()).await.unwrap();
        gone.get().await.unwrap();
        comes_to_rest(manager.pid()).await;
        manager.shutdown().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn cont_05_a_dict() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let dict = manager.dict::<String, i64>().await.unwrap();
        assert_eq!(dict.insert("a".into(), 1).await.unwrap(), None);
        assert_eq!(dict.insert("a".into(), 2).await.unwrap(), Some(1));
        dict.extend(vec![("b".into(), 3), ("c".into(), 4)]).await.unwrap();
        assert_eq!(dict.get("b").await.unwrap(), Some(3));
        assert_eq!(dict.get(&"nobody".to_string()).await.unwrap(), None);
        assert!(dict.contains_key("c").await.unwrap() && !dict.contains_key("d").await.unwrap());
        let mut items = dict.items().await.unwrap();
        items.sort();
        assert_eq!(items, [("a".to_string(), 2), ("b".to_string(), 3), ("c".to_string(), 4)]);
        let (mut keys, mut values) = (dict.keys().await.unwrap(), dict.values().await.unwrap());
        keys.sort();
        values.sort();
        assert_eq!((keys.join(""), values), ("abc".to_string(), vec![2, 3, 4]));
        assert_eq!(dict.remove("a").await.unwrap(), Some(2));
        assert_eq!(dict.remove("a").await.unwrap(), None);
        assert_eq!(dict.len().await.unwrap(), 2);
        let by_bytes = manager.dict::<Vec<u8>, Vec<f64>>().await.unwrap();
        by_bytes.insert(vec![1, 2], vec![0.5]).await.unwrap();
        assert_eq!(by_bytes.get([1u8, 2].as_slice()).await.unwrap(), Some(vec![0.5]));
        assert_eq!(by_bytes.values().await.unwrap(), [[0.5]]);
        let by_number = manager.dict::<i64, i64>().await.unwrap();
        by_number.insert(-1, 1).await.unwrap();
        assert_eq!((by_number.get(&-1).await.unwrap(), by_number.keys().await.unwrap()), (Some(1), vec![-1]));
        manager.shutdown().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn cont_06_keys_values_and_items_are_of_one_moment() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let dict = manager.dict::<u32, u32>().await.unwrap();
        dict.extend((0..10).map(|n| (n, n)).collect()).await.unwrap();
        let keys = dict.keys().await.unwrap();
        dict.clear().await.unwrap();
        assert_eq!((keys.len(), dict.len().await.unwrap()), (10, 0));
        manager.shutdown().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn cont_07_nested_objects_outlive_the_proxies_they_were_made_with() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let outer = manager.dict::<String, DictProxy<String, u32>>().await.unwrap();
        {
            let inner = manager.dict().await.unwrap();
            inner.insert("deep".into(), 1).await.unwrap();
            outer.insert("inner".into(), inner).await.unwrap();
        }
        let inner = outer.get("inner").await.unwrap().unwrap();
        assert_eq!(inner.get("deep").await.unwrap(), Some(1));
        outer.clear().await.unwrap();
        assert_eq!(inner.get("deep").await.unwrap(), Some(1), "clear drops references only");
        objects_go(&manager, 2).await;
        drop(inner);
        objects_go(&manager, 1).await;
        manager.shutdown().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn cont_08_queues_in_a_list_and_a_dict() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let queue = Queue::<u32>::unbounded().unwrap();
        let list = manager.list().await.unwrap();
        list.push(queue.clone()).await.unwrap();
        let dict = manager.dict().await.unwrap();
        dict.insert(1, queue.clone()).await.unwrap();
        list.get(0).await.unwrap().unwrap().put(7).await.unwrap();
        drop(queue);
        assert_eq!(dict.remove(&1).await.unwrap().unwrap().get().await.unwrap(), 7);
        manager.shutdown().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn cont_09_a_namespace() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let names = manager.namespace().await.unwrap();
        names.set("name", "Rita".to_string()).await.unwrap();
        names.set("_job", 5u32).await.unwrap();
        let list = manager.list::<u32>().await.unwrap();
        names.set("list", list.clone()).await.unwrap();
        assert_eq!(names.get::<String>("name").await.unwrap(), Some("Rita".into()));
        let error = names.get::<String>("_job").await.unwrap_err();
        assert!(error.kind() == ErrorKind::Decode && error.to_string().contains("u32"), "{error}");
        assert_eq!(names.get::<u32>("age").await.unwrap(), None);
        names.get::<ListProxy<u32>>("list").await.unwrap().unwrap().push(1).await.unwrap();
        assert_eq!(list.len().await.unwrap(), 1);
        assert!(names.remove("_job").await.unwrap() && !names.remove("_job").await.unwrap());
        assert_eq!(names.names().await.unwrap(), ["list", "name"]);
        manager.shutdown().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn cont_10_p26_update_changes_a_value_in_place() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let dict = manager.dict::<String, Vec<u32>>().await.unwrap();
        dict.insert("l".into(), vec![1]).await.unwrap();
        dict.get("l").await.unwrap().unwrap().push(2); // A copy, and the type says so.
        assert_eq!(dict.get("l").await.unwrap(), Some(vec![1]));
        dict.update(|dict| dict.get_mut("l").map(|list| list.push(2))).await.unwrap();
        assert_eq!(dict.get("l").await.unwrap(), Some(vec![1, 2]));
        manager.shutdown().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn mgr_02_rmgr_06_call_after_shutdown_fails_and_second_shutdown_succeeds() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let list = manager.list::<u32>().await.unwrap();
        manager.shutdown().await.unwrap();
        manager.shutdown().await.unwrap();
        let error = list.push(1).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Closed);
        assert!(error.to_string().contains(&manager.pid().to_string()), "{error}");
        assert_eq!(manager.list::<u32>().await.unwrap_err().kind(), ErrorKind::Closed);
        let clone = list.clone();
        drop((clone, list, manager));
    })
    .await;
}

#[tokio::test]
async fn mgr_02_manager_ends_with_its_last_handle() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let (pid, list) = (manager.pid(), manager.list::<u32>().await.unwrap());
        drop(manager);
        list.push(1).await.unwrap();
        assert!(mp::active_children().iter().any(|child| child.pid() == pid));
        drop(list);
        eventually("it ends", || mp::active_children().iter().all(|child| child.pid() != pid)).await;
    })
    .await;
}

fn private(tally: &mut Tally) -> i64 {
    tally.total
}

#[tokio::test]
async fn mgr_03_mgr_05_only_exposed_functions_can_be_called() {
    within(async {
        let exposed = [Exposed::maker(Tally::new), Exposed::method(Tally::add)];
        let manager = Manager::builder().name("narrow").expose(exposed).start().await.unwrap();
        let tally = manager.create(Tally::new, (1,)).await.unwrap();
        assert_eq!(tally.call(Tally::add, (1,)).await.unwrap(), 2);
        let error = tally.call(private, ()).await.unwrap_err();
        assert!(error.to_string().contains("not exposed"), "{error}");
        assert!(manager.dict::<u32, u32>().await.unwrap_err().to_string().contains("not exposed"));
        manager.shutdown().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn mgr_04_error_or_panic_of_a_method_reaches_its_caller_only() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let tally = manager.create(Tally::new, (0,)).await.unwrap();
        assert_eq!(tally.call(Tally::refuse, (-1,)).await.unwrap().unwrap_err().to_string(), "negative");
        let error = tally.call(Tally::fail, ("no luck".to_string(),)).await.unwrap_err();
        assert_eq!((error.kind(), error.panic().unwrap().message()), (ErrorKind::Panicked, "no luck"));
        assert!(error.panic().unwrap().location().unwrap().contains("manager.rs"));
        assert_eq!(tally.call(Tally::total, ()).await.unwrap(), 1, "the object stays as the method left it");
        let error = manager.create(|| -> u32 { panic!("never made") }, ()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Panicked);
        assert_eq!(manager.object_count().await.unwrap(), 1);
        manager.shutdown().await.unwrap();
    })
    .await;
}

struct DropsBadly;

impl Drop for DropsBadly {
    fn drop(&mut self) {
        panic!("in drop");
    }
}

#[tokio::test]
async fn panic_in_a_drop_leaves_the_manager_usable() {
    within(async {
        let manager = Manager::start().await.unwrap();
        drop(manager.create(|| DropsBadly, ()).await.unwrap());
        objects_go(&manager, 0).await;
        let tally = manager.create(Tally::new, (1,)).await.unwrap();
        let throws = |_: &mut Tally| -> i64 { std::panic::panic_any(DropsBadly) };
        assert_eq!(tally.call(throws, ()).await.unwrap_err().kind(), ErrorKind::Panicked);
        assert_eq!(tally.call(Tally::total, ()).await.unwrap(), 1);
        let list = manager.list().await.unwrap();
        list.push(1).await.unwrap();
        manager.shutdown().await.unwrap();
    })
    .await;
}

/// Panics when it is dropped where that was asked for.
#[derive(Serialize, Deserialize)]
struct Touchy;

static IS_TOUCHY: AtomicBool = AtomicBool::new(false);

impl Drop for Touchy {
    fn drop(&mut self) {
        if IS_TOUCHY.load(Relaxed) {
            panic!("in drop");
        }
    }
}

#[tokio::test]
async fn panic_in_the_drop_of_a_waits_arguments_fails_that_wait_only() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let queue = manager.queue::<Touchy>(1).await.unwrap();
        queue.put(Touchy).await.unwrap();
        drop(manager.create(|| IS_TOUCHY.store(true, Relaxed), ()).await.unwrap());
        let mut puts = [Box::pin(queue.put(Touchy)), Box::pin(queue.put(Touchy))];
        puts.iter_mut().for_each(|put| assert!(put.now_or_never().is_none()));
        // Both fail now, one after the other, and what they did not put goes.
        queue.close().await.unwrap();
        for put in puts {
            assert_eq!(put.await.unwrap_err().kind(), ErrorKind::Closed);
        }
        assert_eq!(queue.len().await.unwrap(), 1);
        manager.shutdown().await.unwrap();
    })
    .await;
}

/// What a generator is here: an object with a step.
#[tokio::test]
async fn mgr_06_iterator_is_advanced_through_its_proxy() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let squares = manager.create(|| (0..5u64).map(|n| n * n), ()).await.unwrap();
        let steps = futures::stream::try_unfold(squares, async |squares| {
            Ok::<_, mp::Error>(squares.call(Iterator::next, ()).await?.map(|n| (n, squares)))
        });
        assert_eq!(steps.try_collect::<Vec<_>>().await.unwrap(), [0, 1, 4, 9, 16]);
        manager.shutdown().await.unwrap();
    })
    .await;
}

#[derive(Debug)]
struct Unwritable;
impl Serialize for Unwritable {
    fn serialize<S: serde::Serializer>(&self, _: S) -> Result<S::Ok, S::Error> {
        Err(serde::ser::Error::custom("not today"))
    }
}
impl<'de> Deserialize<'de> for Unwritable {
    fn deserialize<D: serde::Deserializer<'de>>(_: D) -> Result<Self, D::Error> {
        Ok(Self)
    }
}

#[tokio::test]
async fn rmgr_02_value_that_cannot_be_serialised_fails_its_call_only() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let list = manager.list::<Unwritable>().await.unwrap();
        let error = list.push(Unwritable).await.unwrap_err();
        assert!(error.kind() == ErrorKind::Encode && error.to_string().contains("not today"), "{error}");
        let error = list.update(|_| Unwritable).await.unwrap_err();
        assert!(error.kind() == ErrorKind::Encode && error.to_string().contains("not today"), "{error}");
        assert!(list.is_empty().await.unwrap());
        manager.shutdown().await.unwrap();
    })
    .await;
}

#[derive(Serialize)]
struct Unreadable;
impl<'de> Deserialize<'de> for Unreadable {
    fn deserialize<D: serde::Deserializer<'de>>(_: D) -> Result<Self, D::Error> {
        panic!("not to be read")
    }
}

#[tokio::test]
async fn mgr_04_panic_while_decoding_arguments_reaches_the_caller_only() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let tally = manager.create(Tally::new, (3,)).await.unwrap();
        for _ in 0..2 {
            let error = tally.call(|_: &mut Tally, _: Unreadable| (), (Unreadable,)).await.unwrap_err();
            assert_eq!((error.kind(), error.panic().unwrap().message()), (ErrorKind::Panicked, "not to be read"));
            tally.call(Tally::add, (1,)).await.expect("the object stays, and its line moves");
        }
        assert_eq!(tally.call(Tally::total, ()).await.unwrap(), 5);
        let error = manager.create(|_: Unreadable| 1u32, (Unreadable,)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Panicked);
        assert_eq!(manager.object_count().await.unwrap(), 1);
        manager.shutdown().await.unwrap();
    })
    .await;
}

type Everything = (ListProxy<u32>, DictProxy<String, u32>, Namespace, Proxy<Tally>);

async fn use_everything((list, dict, names, tally): Everything) -> mp::Result<()> {
    assert_eq!(list.get(0).await?, Some(1));
    list.push(2).await?;
    assert_eq!(dict.get("x").await?, Some(1));
    dict.insert("y".into(), 2).await?;
    assert_eq!(names.get::<u32>("x").await?, Some(1));
    names.set("y", "two".to_string()).await?;
    assert_eq!(tally.call(Tally::add, (1,)).await?, 2);
    Ok(())
}

#[tokio::test]
async fn smtypes_07_parent_sees_the_writes_of_a_child() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let list = manager.list().await.unwrap();
        let dict = manager.dict().await.unwrap();
        let names = manager.namespace().await.unwrap();
        let tally = manager.create(Tally::new, (1,)).await.unwrap();
        list.push(1).await.unwrap();
        dict.insert("x".into(), 1).await.unwrap();
        names.set("x", 1u32).await.unwrap();
        in_child(use_everything, ((list.clone(), dict.clone(), names.clone(), tally.clone()),)).await.unwrap();
        assert_eq!(list.to_vec().await.unwrap(), [1, 2]);
        assert_eq!(dict.get("y").await.unwrap(), Some(2));
        assert_eq!(names.get::<String>("y").await.unwrap(), Some("two".into()));
        assert_eq!(tally.call(Tally::total, ()).await.unwrap(), 2);
        drop((list, dict, names, tally));
        objects_go(&manager, 0).await;
        manager.shutdown().await.unwrap();
    })
    .await;
}

async fn make_and_return(manager_list: ListProxy<ListProxy<u32>>) -> mp::Result<ListProxy<u32>> {
    let inner = manager_list.get(0).await?.ok_or_else(|| mp::Error::other("no list"))?;
    inner.push(9).await?;
    Ok(inner)
}

#[tokio::test]
async fn smtypes_08_handle_on_its_way_keeps_its_object_until_it_is_lost() {
    within(async {
        let manager = Manager::start().await.unwrap();
        // In a queue, with no other handle anywhere.
        let queue = Queue::unbounded().unwrap();
        let list = manager.list::<u32>().await.unwrap();
        list.push(1).await.unwrap();
        queue.put(vec![list.clone(), list]).await.unwrap();
        assert_eq!(manager.object_count().await.unwrap(), 1);
        assert_eq!(manager.object_count().await.unwrap(), 1);
        let lists = queue.get().await.unwrap();
        assert_eq!(lists[1].to_vec().await.unwrap(), [1]);
        drop(lists);
        objects_go(&manager, 0).await;
        // Lost with its queue.
        queue.put(vec![manager.list::<u32>().await.unwrap()]).await.unwrap();
        assert_eq!(manager.object_count().await.unwrap(), 1);
        drop(queue);
        objects_go(&manager, 0).await;
        // From a child that has ended.
        let outer = manager.list().await.unwrap();
        outer.push(manager.list().await.unwrap()).await.unwrap();
        let inner = Process::spawn(make_and_return, (outer.clone(),)).unwrap().await.unwrap().unwrap();
        outer.clear().await.unwrap();
        assert_eq!(inner.to_vec().await.unwrap(), [9]);
        drop((outer, inner));
        objects_go(&manager, 0).await;
        manager.shutdown().await.unwrap();
    })
    .await;
}

/// Sends a handle on, and goes at once without another word.
fn pass_on_and_die(list: ListProxy<u32>, to: Queue<ListProxy<u32>>) {
    to.blocking_put(list).unwrap();
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
}

#[tokio::test]
async fn handle_survives_its_sender_killed_after_sending() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let queue = Queue::unbounded().unwrap();
        let list = manager.list::<u32>().await.unwrap();
        list.push(1).await.unwrap();
        let mut child = Process::spawn(pass_on_and_die, (list, queue.clone())).unwrap();
        child.wait().await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await; // For the manager to notice, which must change nothing.
        assert_eq!(queue.get().await.unwrap().to_vec().await.unwrap(), [1]);
        manager.shutdown().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn handle_survives_its_sender_killed_while_the_manager_is_stopped() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let queue = Queue::unbounded().unwrap();
        let list = manager.list::<u32>().await.unwrap();
        list.push(1).await.unwrap();
        stop(manager.pid());
        let mut child = Process::spawn(pass_on_and_die, (list, queue.clone())).unwrap();
        child.wait().await.unwrap();
        go_on(manager.pid());
        assert_eq!(queue.get().await.unwrap().to_vec().await.unwrap(), [1]);
        manager.shutdown().await.unwrap();
    })
    .await;
}

async fn hold_many(list: ListProxy<ListProxy<u32>>, ready: Queue<usize>) {
    let lists = list.to_vec().await.unwrap();
    list.clear().await.unwrap();
    ready.put(lists.len()).await.unwrap();
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn p26_killed_client_with_ten_thousand_proxies_leaves_no_object() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let (outer, ready) = (manager.list().await.unwrap(), Queue::unbounded().unwrap());
        let lists = futures::stream::iter(0..10_000).map(|_| manager.list()).buffer_unordered(100);
        outer.extend(lists.try_collect().await.unwrap()).await.unwrap();
        let child = Process::spawn(hold_many, (outer.clone(), ready.clone())).unwrap();
        assert_eq!(ready.get().await.unwrap(), 10_000);
        assert_eq!(manager.object_count().await.unwrap(), 10_001);
        child.kill().unwrap();
        objects_go(&manager, 1).await;
        manager.shutdown().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn killed_manager_fails_every_pending_call_at_once() {
    let kill = async || {
        let manager = Manager::start().await?;
        let tally = manager.create(Tally::new, (0,)).await?;
        let calls = (0..100).map(|_| tally.call(Tally::add_slowly, (1, Duration::from_secs(100))));
        let mut calls = calls.collect::<futures::stream::FuturesUnordered<_>>();
        assert!(calls.next().now_or_never().is_none());
        // They are there when one that came after them is answered.
        manager.object_count().await.unwrap();
        let pid = rustix::process::Pid::from_raw(manager.pid() as i32).unwrap();
        let start = Instant::now();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        let mut failed = 0;
        while let Some(result) = calls.next().await {
            assert_eq!(result.unwrap_err().kind(), ErrorKind::Closed);
            failed += 1;
        }
        let took = start.elapsed();
        assert_eq!(failed, 100);
        assert_eq!(tally.call(Tally::total, ()).await.unwrap_err().kind(), ErrorKind::Closed);
        manager.shutdown().await?;
        Ok(took)
    };
    within(common::rounds(kill, |took| *took < Duration::from_millis(100))).await.unwrap();
}

#[tokio::test]
async fn slow_object_delays_no_other() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let slow = manager.create(Tally::new, (0,)).await.unwrap();
        let quick = manager.create(Tally::new, (0,)).await.unwrap();
        let go = Queue::unbounded().unwrap();
        let mut blocked = Box::pin(slow.call(Tally::add_when_told, (1, go.clone())));
        for round in 0..200 {
            assert!((&mut blocked).now_or_never().is_none(), "round {round}");
            quick.call(Tally::add, (1,)).await.unwrap();
        }
        go.put(()).await.unwrap();
        // Behind the slow call, and not beside it.
        assert_eq!(slow.call(Tally::add, (1,)).await.unwrap(), 2);
        assert_eq!(blocked.await.unwrap(), 1);
        manager.shutdown().await.unwrap();
    })
    .await;
}

async fn add_many(tally: Proxy<Tally>, n: usize) -> mp::Result<()> {
    let adds = (0..n).map(|_| tally.call(Tally::add_slowly, (1, Duration::ZERO)));
    futures::stream::iter(adds).buffer_unordered(8).try_for_each(async |_| Ok(())).await
}

#[tokio::test]
async fn calls_of_many_clients_on_one_object_are_serial() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let tally = manager.create(Tally::new, (0,)).await.unwrap();
        let children: Vec<_> = (0..4).map(|_| Process::spawn(add_many, (tally.clone(), 500)).unwrap()).collect();
        // Slow ones too, which other threads run.
        for _ in 0..20 {
            tally.call(Tally::add_slowly, (1, Duration::from_millis(4))).await.unwrap();
        }
        for child in children {
            child.await.unwrap().unwrap();
        }
        assert_eq!(tally.call(Tally::total, ()).await.unwrap(), 4 * 500 + 20);
        manager.shutdown().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn dropped_call_is_made_or_not_and_no_other_gets_its_answer() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let tally = manager.create(Tally::new, (0,)).await.unwrap();
        let mut random = common::Random::new(5);
        let mut made = 0;
        for n in 0..5_000i64 {
            let mut call = Box::pin(tally.call(Tally::add, (1,)));
            for _ in 0..random.below(3) {
                if (&mut call).now_or_never().is_some() {
                    break;
                }
            }
            drop(call);
            // Its answer says the number that was asked with it, so nobody else's will do.
            assert_eq!(tally.call(|_: &mut Tally, n: i64| n, (n,)).await.unwrap(), n);
            made += 1;
        }
        assert!((0..=made).contains(&tally.call(Tally::total, ()).await.unwrap()));
        // Objects of dropped calls go.
        for _ in 0..500 {
            let mut making = Box::pin(manager.list::<u32>());
            let _ = (&mut making).now_or_never();
            drop(making);
        }
        objects_go(&manager, 1).await;
        manager.shutdown().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn unpolled_call_blocks_no_other() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let slow = manager.create(Tally::new, (0,)).await.unwrap();
        let tally = manager.create(Tally::new, (0,)).await.unwrap();
        let mut left_alone = Box::pin(slow.call(Tally::add_slowly, (1, Duration::from_millis(5))));
        assert!((&mut left_alone).now_or_never().is_none());
        for n in 1..=100 {
            assert_eq!(tally.call(Tally::add_slowly, (1, Duration::from_millis(1))).await.unwrap(), n);
        }
        assert_eq!(left_alone.await.unwrap(), 1);
        manager.shutdown().await.unwrap();
    })
    .await;
}

async fn acquire_once(lock: mp::LockProxy, ready: Queue<()>) {
    ready.put(()).await.unwrap();
    drop(lock.acquire().await.unwrap());
}

#[tokio::test]
async fn releases_beyond_a_full_pipe_arrive_without_another_call() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let (lock, ready) = (manager.lock().await.unwrap(), Queue::unbounded().unwrap());
        let held = lock.acquire().await.unwrap();
        let (outer, inner) = (manager.list().await.unwrap(), manager.list::<u32>().await.unwrap());
        outer.extend(vec![inner; 1000]).await.unwrap();
        let mut lists = Vec::new();
        for _ in 0..40 {
            lists.extend(outer.to_vec().await.unwrap());
        }
        let child = Process::spawn(acquire_once, (lock.clone(), ready.clone())).unwrap();
        ready.get().await.unwrap();
        // It does not read while forty thousand handles go, which is more than the pipe has room for.
        stop(manager.pid());
        drop(lists);
        drop(held);
        go_on(manager.pid());
        child.await.unwrap();
        manager.shutdown().await.unwrap();
    })
    .await;
}

/// Stops the manager, and begins more pushes than the pipe to it has room for: calls that come after them wait for room.
fn fill_pipe<'a>(manager: &Manager, list: &'a ListProxy<Vec<u8>>) -> Vec<BoxFuture<'a, mp::Result<()>>> {
    stop(manager.pid());
    let mut pushes: Vec<_> = (0..8).map(|_| list.push(vec![0; 1 << 18]).boxed()).collect();
    assert!(pushes.iter_mut().all(|push| push.now_or_never().is_none()));
    pushes
}

#[tokio::test]
async fn unpolled_call_that_waits_for_room_blocks_no_other() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let (list, tally) = (manager.list().await.unwrap(), manager.create(Tally::new, (0,)).await.unwrap());
        let full = fill_pipe(&manager, &list);
        let mut calls = [1, 10, 100].map(|n| tally.call(Tally::add, (n,)).boxed());
        assert!(calls.iter_mut().all(|call| call.now_or_never().is_none()));
        let [first, dropped, third] = calls;
        drop((dropped, full));
        go_on(manager.pid());
        assert_eq!(third.await.unwrap(), 100, "no other was made");
        assert_eq!(first.await.unwrap(), 101);
        let mut full = fill_pipe(&manager, &list);
        full.push(tally.call(|_: &mut Tally| (), ()).boxed());
        assert!(full[8].as_mut().now_or_never().is_none());
        let pid = rustix::process::Pid::from_raw(manager.pid() as i32).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        for call in full {
            assert_eq!(call.await.unwrap_err().kind(), ErrorKind::Closed);
        }
        manager.shutdown().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn wait_that_is_dropped_takes_nothing_whether_it_was_sent_or_not() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let (list, lock) = (manager.list().await.unwrap(), manager.lock().await.unwrap());
        let queue = manager.queue(None).await.unwrap();
        let full = fill_pipe(&manager, &list);
        assert!(lock.acquire().now_or_never().is_none());
        drop(full);
        go_on(manager.pid());
        drop(lock.try_acquire().await.unwrap());
        assert!(queue.get().now_or_never().is_none());
        queue.put(7).await.unwrap();
        assert_eq!(queue.get().await.unwrap(), 7);
        manager.shutdown().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn condition_wait_that_is_never_sent_keeps_the_lock() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let (list, condition) = (manager.list().await.unwrap(), manager.condition().await.unwrap());
        let held = condition.lock().await.unwrap();
        let full = fill_pipe(&manager, &list);
        let error = condition.wait_timeout(held, Duration::from_millis(1)).await.unwrap_err();
        assert!(error.kind() == ErrorKind::Timeout && error.has_guard(), "{error}");
        drop(full);
        go_on(manager.pid());
        let mut locking = condition.lock().boxed();
        assert!((&mut locking).now_or_never().is_none());
        assert_eq!(condition.waiting().await.unwrap(), 0);
        assert!((&mut locking).now_or_never().is_none(), "it is still held");
        drop(error);
        drop(locking.await.unwrap());
        manager.shutdown().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn put_timeout_puts_nothing_if_it_was_not_sent_and_else_waits_for_the_managers_decision() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let (list, queue) = (manager.list().await.unwrap(), manager.queue(None).await.unwrap());
        let full = fill_pipe(&manager, &list);
        let error = queue.put_timeout(1, Duration::from_millis(1)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Timeout);
        drop(full);
        go_on(manager.pid());
        assert_eq!(queue.len().await.unwrap(), 0);
        stop(manager.pid());
        let mut putting = queue.put_timeout(2, Duration::from_millis(1)).boxed();
        let late = tokio::time::timeout(Duration::from_millis(50), &mut putting).await;
        assert!(late.is_err(), "the manager has not decided");
        go_on(manager.pid());
        putting.await.unwrap();
        assert_eq!(queue.len().await.unwrap(), 1);
        manager.shutdown().await.unwrap();
    })
    .await;
}

/// A task that has a call of its own, and goes with the call that it waits for.
struct Ends(Mutex<Option<BoxFuture<'static, mp::Result<i64>>>>);

impl Wake for Ends {
    fn wake(self: Arc<Self>) {}
}

#[tokio::test]
async fn dropped_call_can_end_a_task_with_another_call() {
    let _deadline = common::Deadline::start();
    let manager = Manager::start().await.unwrap();
    let (tally, go) = (manager.create(Tally::new, (0,)).await.unwrap(), Queue::unbounded().unwrap());
    let call = |n| {
        let (tally, go) = (tally.clone(), go.clone());
        async move { tally.call(Tally::add_when_told, (n, go)).await }.boxed()
    };
    let (mut first, mut second) = (call(1), call(10));
    let ends = Arc::new(Ends(Mutex::default()));
    let waker = Waker::from(ends.clone());
    while Arc::strong_count(&ends) == 2 {
        assert!(first.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
    }
    assert!((&mut second).now_or_never().is_none());
    *ends.0.lock().unwrap() = Some(second);
    drop((ends, waker));
    drop(first);
    go.put(()).await.unwrap();
    go.put(()).await.unwrap();
    assert_eq!(tally.call(Tally::total, ()).await.unwrap(), 11);
    manager.shutdown().await.unwrap();
}

#[test]
fn one_connection_serves_runtimes_that_come_and_go() {
    let _deadline = common::Deadline::start();
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let first = runtime();
    let manager = first.block_on(Manager::start()).unwrap();
    let tally = first.block_on(manager.create(Tally::new, (0,))).unwrap();
    // It falls asleep on the first runtime, which is then driven no more.
    let go = Queue::unbounded().unwrap();
    let mut asleep = Box::pin(tally.call(Tally::add_when_told, (1, go.clone())));
    first.block_on(async {
        assert!(tokio::time::timeout(Duration::from_millis(5), &mut asleep).await.is_err());
    });
    go.blocking_put(()).unwrap();
    for n in 0..20 {
        let total = runtime().block_on(tally.call(Tally::add_slowly, (1, Duration::from_millis(1)))).unwrap();
        assert_eq!(total, n + 2);
    }
    assert_eq!(runtime().block_on(asleep).unwrap(), 1);
    drop(first);
    runtime().block_on(manager.shutdown()).unwrap();
}

#[tokio::test]
async fn large_answers_to_a_client_that_reads_late_arrive_whole() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let list = manager.list::<Vec<u8>>().await.unwrap();
        let pushes = (0..40u8).map(|n| list.push(vec![n; 300_000]));
        futures::future::try_join_all(pushes).await.unwrap();
        // Twelve MiB of answers, of which the pipe holds one, while nobody reads.
        let mut gets: Vec<_> = (0..40).map(|at| Box::pin(list.get(at))).collect();
        for get in &mut gets {
            let _ = get.now_or_never();
        }
        std::thread::sleep(Duration::from_millis(20));
        let mut firsts = Vec::new();
        for get in gets {
            let bytes = get.await.unwrap().unwrap();
            assert!(bytes.len() == 300_000 && bytes.iter().all(|byte| *byte == bytes[0]));
            firsts.push(bytes[0]);
        }
        firsts.sort();
        assert_eq!(firsts, (0..40).collect::<Vec<_>>());
        manager.shutdown().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn batch_returns_result_or_error_of_each_call() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let tally = manager.create(Tally::new, (0,)).await.unwrap();
        let dict = manager.dict::<String, ListProxy<u32>>().await.unwrap();
        let list = manager.list().await.unwrap();
        let mut batch: Batch = tally.batch();
        assert!(batch.is_empty());
        let first = batch.call(&tally, Tally::add, (5,)).unwrap();
        let failed = batch.call(&tally, Tally::fail, ("in a batch".to_string(),)).unwrap();
        let put = batch.call(dict.proxy(), HashMap::insert, ("l".to_string(), list.clone())).unwrap();
        let got = batch.call(dict.proxy(), |dict: &mut HashMap<String, ListProxy<u32>>| dict.remove("l"), ()).unwrap();
        let last = batch.call(&tally, Tally::total, ()).unwrap();
        assert_eq!(batch.len(), 5);
        let mut replies = batch.send().await.unwrap();
        assert_eq!(replies.take(last).unwrap(), 6);
        assert_eq!(replies.take(first).unwrap(), 5);
        assert_eq!(replies.take(failed).unwrap_err().kind(), ErrorKind::Panicked);
        assert!(replies.take(got).unwrap().unwrap().proxy().is_same_object(list.proxy()));
        assert!(replies.take(put).unwrap().is_none());
        let other = Manager::start().await.unwrap();
        let elsewhere = other.create(Tally::new, (0,)).await.unwrap();
        assert!(tally.batch().call(&elsewhere, Tally::total, ()).is_err());
        manager.shutdown().await.unwrap();
        other.shutdown().await.unwrap();
    })
    .await;
}

/// An object that uses the manager it lives in.
struct Inner(ListProxy<u32>);

#[tokio::test]
async fn object_can_use_other_objects_of_its_manager() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let list = manager.list::<u32>().await.unwrap();
        let inner = manager.create(Inner, (list.clone(),)).await.unwrap();
        let push = |inner: &mut Inner, n: u32| futures::executor::block_on(inner.0.push(n));
        for n in 0..10 {
            inner.call(push, (n,)).await.unwrap().unwrap();
        }
        drop(list);
        let len = inner.call(|inner: &mut Inner| futures::executor::block_on(inner.0.len()), ()).await.unwrap();
        assert_eq!(len.unwrap(), 10);
        let list = inner.call(|inner: &mut Inner| inner.0.clone(), ()).await.unwrap();
        drop(inner);
        objects_go(&manager, 1).await;
        assert_eq!(list.len().await.unwrap(), 10);
        manager.shutdown().await.unwrap();
    })
    .await;
}

#[test]
fn a_proxy_can_be_held_and_used_anywhere() {
    fn is_shareable<T: Send + Sync + Clone + serde::Serialize + serde::de::DeserializeOwned>() {}
    fn is_send<T: Send>(_: T) {}
    is_shareable::<Proxy<std::cell::Cell<u8>>>();
    is_shareable::<ListProxy<String>>();
    is_shareable::<DictProxy<String, u8>>();
    is_shareable::<Namespace>();
    let call = async |proxy: &Proxy<Tally>| proxy.call(Tally::total, ()).await;
    let _ = call;
    fn check(proxy: &Proxy<Tally>, list: &ListProxy<u8>, manager: &Manager) {
        is_send(proxy.call(Tally::total, ()));
        is_send(list.get(1));
        is_send(list.stream());
        is_send(proxy.batch().send());
        is_send(manager.shutdown());
    }
    let _ = check;
}

#[tokio::test]
async fn handle_cannot_be_serialised_outside_of_a_message() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let list = manager.list::<u32>().await.unwrap();
        let error = serde_json::to_vec(&list).unwrap_err();
        assert!(error.to_string().contains("on its way to another process"), "{error}");
        manager.shutdown().await.unwrap();
    })
    .await;
}

async fn holdings_are_steady() -> mp::Result<()> {
    let round = async || {
        let manager = Manager::start().await?;
        let list = manager.list::<ListProxy<u32>>().await?;
        for _ in 0..20 {
            list.push(manager.list().await?).await?;
        }
        drop(list.to_vec().await?);
        manager.shutdown().await
    };
    round().await?;
    let before = common::holdings();
    for _ in 0..10 {
        round().await?;
    }
    common::no_growth(before, common::holdings).await;
    Ok(())
}

#[tokio::test]
async fn ended_manager_leaves_nothing_in_its_clients() {
    in_child(holdings_are_steady, ()).await.unwrap();
}

#[tokio::test]
async fn unit_none_and_null_values_are_stored() {
    async fn check<T>(value: T)
    where
        T: Serialize + serde::de::DeserializeOwned + Clone + PartialEq + std::fmt::Debug + Send + 'static,
    {
        let manager = Manager::start().await.unwrap();
        let dict = manager.dict::<Option<u8>, T>().await.unwrap();
        assert_eq!(dict.get(&None).await.unwrap(), None);
        assert_eq!(dict.insert(None, value.clone()).await.unwrap(), None);
        assert_eq!(dict.insert(None, value.clone()).await.unwrap(), Some(value.clone()));
        assert_eq!(dict.get(&None).await.unwrap(), Some(value.clone()));
        assert_eq!(dict.items().await.unwrap(), [(None, value.clone())]);
        assert_eq!(dict.values().await.unwrap(), std::slice::from_ref(&value));
        assert_eq!(dict.remove(&None).await.unwrap(), Some(value.clone()));
        assert_eq!(dict.remove(&None).await.unwrap(), None);

        let list = manager.list::<T>().await.unwrap();
        list.push(value.clone()).await.unwrap();
        list.push(value.clone()).await.unwrap();
        assert_eq!(list.get(1).await.unwrap(), Some(value.clone()));
        assert_eq!(list.get(2).await.unwrap(), None);
        assert_eq!(list.to_vec().await.unwrap(), [value.clone(), value.clone()]);
        assert_eq!(list.remove(0).await.unwrap(), value);
        assert_eq!(list.pop().await.unwrap(), Some(value.clone()));
        assert_eq!(list.pop().await.unwrap(), None);

        let names = manager.namespace().await.unwrap();
        assert_eq!(names.get::<T>("name").await.unwrap(), None);
        names.set("name", value.clone()).await.unwrap();
        assert_eq!(names.get("name").await.unwrap(), Some(value.clone()));

        let queue = manager.queue::<T>(2).await.unwrap();
        queue.put(value.clone()).await.unwrap();
        assert_eq!(queue.get().await.unwrap(), value);
        manager.shutdown().await.unwrap();
    }
    within(async {
        check(()).await;
        check(None::<()>).await;
        check(Some(None::<u8>)).await;
        check(serde_json::Value::Null).await;
    })
    .await;
}

/// A value whose own code puts a proxy into a queue while it is encoded.
#[derive(Clone)]
struct PutsAside(Option<(mp::ListProxy<u32>, Queue<mp::ListProxy<u32>>)>);

impl serde::Serialize for PutsAside {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if let Some((list, queue)) = &self.0 {
            queue.try_put(list.clone()).map_err(serde::ser::Error::custom)?;
        }
        serializer.serialize_none()
    }
}

impl<'de> serde::Deserialize<'de> for PutsAside {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        <Option<()> as serde::Deserialize>::deserialize(deserializer).map(|_| Self(None))
    }
}

#[tokio::test]
async fn proxy_put_into_a_queue_while_an_argument_is_encoded_arrives_there() {
    within(async {
        let manager = Manager::start().await.unwrap();
        let tally = manager.create(Tally::new, (0,)).await.unwrap();
        let queue = Queue::unbounded().unwrap();
        for n in 0..10 {
            let list = manager.list().await.unwrap();
            list.push(n).await.unwrap();
            let aside = PutsAside(Some((list, queue.clone())));
            let call = |tally: &mut Tally, aside: PutsAside| (tally.total(), aside.0.is_none());
            assert_eq!(tally.call(call, (aside,)).await.unwrap(), (0, true));
            let list: mp::ListProxy<u32> = queue.try_get().unwrap();
            assert_eq!(list.to_vec().await.unwrap(), [n]);
        }
        objects_go(&manager, 1).await;
        manager.shutdown().await.unwrap();
    })
    .await;
}
