//! Generated values of nested types, through a queue.

use multiprocess::Queue;
use proptest::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum Node {
    Nothing,
    Unit(()),
    Bool(bool),
    Small(i8),
    Large(i128),
    Float(u64),
    Text(String),
    Bytes(Vec<u8>),
    Numbers(Vec<u32>),
    Pairs(Vec<(u16, i64)>),
    Arrays(Vec<[u8; 3]>),
    Rows(Vec<Row>),
    Mixed(Vec<(u8, Option<u16>)>),
    Maybe(Option<Box<Node>>),
    Twice(Option<Option<u8>>),
    List(Vec<Node>),
    Map(BTreeMap<String, Node>),
    Keys(BTreeMap<Option<u8>, Option<()>>),
    Tuple(Box<(Node, Node)>, u8),
    Struct {
        #[serde(skip_serializing_if = "Option::is_none", default)]
        left: Option<Box<Node>>,
        middle: u8,
        #[serde(skip_serializing_if = "Vec::is_empty", default)]
        right: Vec<Node>,
    },
    Blob(#[serde(with = "serde_bytes")] Vec<u8>),
    Tagged(Tagged),
    Untagged(Untagged),
    Adjacent(Adjacent),
    Flat(Flat),
}

/// Rows of numbers, but for those whose last field is left out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Row {
    a: u32,
    b: (i8, bool),
    c: [i64; 2],
    #[serde(skip_serializing_if = "is_zero", default)]
    d: u16,
}

fn is_zero(n: &u16) -> bool {
    *n == 0
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "t")]
enum Tagged {
    Unit,
    Struct {
        a: Option<u64>,
        b: Vec<i32>,
    },
    Inner(Leaf),
    Blob {
        #[serde(with = "serde_bytes")]
        blob: Vec<u8>,
    },
    Many {
        many: Vec<Tagged>,
        adjacent: Adjacent,
    },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "t", content = "c")]
enum Adjacent {
    Unit,
    Maybe(Option<Option<u8>>),
    Tuple(u8, Vec<(u16, bool)>),
    Struct { a: Option<()>, b: String },
    Many(Vec<Adjacent>),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum Untagged {
    Flag(bool),
    Number(i64),
    Text(String),
    List(Vec<u8>),
    Leaf(Leaf),
    Blob {
        #[serde(with = "serde_bytes")]
        blob: Vec<u8>,
    },
    // No list by itself: one of numbers would be taken for `List`.
    Many {
        many: Vec<Untagged>,
        tagged: Tagged,
        flat: Option<Box<Flat>>,
    },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Leaf {
    x: u32,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    y: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Flat {
    before: u8,
    #[serde(flatten)]
    leaf: Leaf,
    inner: Option<Box<Flat>>,
    #[serde(with = "serde_bytes")]
    blob: Vec<u8>,
    #[serde(flatten)]
    rest: BTreeMap<String, Option<u64>>,
}

fn leaf() -> impl Strategy<Value = Leaf> {
    (any::<u32>(), any::<Option<String>>()).prop_map(|(x, y)| Leaf { x, y })
}

fn row() -> impl Strategy<Value = Row> {
    let d = prop_oneof![20 => 1..u16::MAX, 1 => Just(0)];
    (any::<u32>(), any::<(i8, bool)>(), any::<[i64; 2]>(), d).prop_map(|(a, b, c, d)| Row { a, b, c, d })
}

fn adjacent() -> impl Strategy<Value = Adjacent> {
    let leaf = prop_oneof![
        Just(Adjacent::Unit),
        any::<Option<Option<u8>>>().prop_map(Adjacent::Maybe),
        any::<(u8, Vec<(u16, bool)>)>().prop_map(|(n, pairs)| Adjacent::Tuple(n, pairs)),
        any::<(Option<()>, String)>().prop_map(|(a, b)| Adjacent::Struct { a, b }),
    ];
    leaf.prop_recursive(2, 6, 3, |inner| proptest::collection::vec(inner, 0..3).prop_map(Adjacent::Many))
}

/// Bytes, often those of a text.
fn blob() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![any::<String>().prop_map(String::into_bytes), any::<Vec<u8>>()]
}

fn tagged() -> impl Strategy<Value = Tagged> {
    let leaf = prop_oneof![
        Just(Tagged::Unit),
        (any::<Option<u64>>(), any::<Vec<i32>>()).prop_map(|(a, b)| Tagged::Struct { a, b }),
        leaf().prop_map(Tagged::Inner),
        blob().prop_map(|blob| Tagged::Blob { blob }),
    ];
    leaf.prop_recursive(2, 6, 3, |inner| {
        (proptest::collection::vec(inner, 0..3), adjacent())
            .prop_map(|(many, adjacent)| Tagged::Many { many, adjacent })
    })
}

fn untagged() -> impl Strategy<Value = Untagged> {
    let leaf = prop_oneof![
        any::<bool>().prop_map(Untagged::Flag),
        any::<i64>().prop_map(Untagged::Number),
        any::<String>().prop_map(Untagged::Text),
        any::<Vec<u8>>().prop_map(Untagged::List),
        leaf().prop_map(Untagged::Leaf),
        blob().prop_map(|blob| Untagged::Blob { blob }),
    ];
    leaf.prop_recursive(2, 6, 3, |inner| {
        let flat = proptest::option::of(flat().prop_map(Box::new));
        (proptest::collection::vec(inner, 0..3), tagged(), flat).prop_map(|(many, tagged, flat)| Untagged::Many {
            many,
            tagged,
            flat,
        })
    })
}

fn flat() -> impl Strategy<Value = Flat> {
    // Names that the other fields have would be taken for them.
    let rest = proptest::collection::btree_map("r[a-z]{0,4}", any::<Option<u64>>(), 0..4);
    let one = (any::<u8>(), leaf(), blob(), rest);
    let one = one.prop_map(|(before, leaf, blob, rest)| Flat { before, leaf, inner: None, blob, rest }).boxed();
    one.clone().prop_recursive(2, 4, 1, move |inner| {
        (one.clone(), inner).prop_map(|(flat, inner)| Flat { inner: Some(Box::new(inner)), ..flat })
    })
}

fn node() -> impl Strategy<Value = Node> {
    let leaf = prop_oneof![
        Just(Node::Nothing),
        Just(Node::Unit(())),
        any::<bool>().prop_map(Node::Bool),
        any::<i8>().prop_map(Node::Small),
        any::<i128>().prop_map(Node::Large),
        any::<u64>().prop_map(Node::Float),
        any::<String>().prop_map(Node::Text),
        any::<Vec<u8>>().prop_map(Node::Bytes),
        any::<Vec<u32>>().prop_map(Node::Numbers),
        any::<Vec<(u16, i64)>>().prop_map(Node::Pairs),
        any::<Vec<[u8; 3]>>().prop_map(Node::Arrays),
        proptest::collection::vec(row(), 0..40).prop_map(Node::Rows),
        any::<Vec<(u8, Option<u16>)>>().prop_map(Node::Mixed),
        any::<Option<Option<u8>>>().prop_map(Node::Twice),
        any::<BTreeMap<Option<u8>, Option<()>>>().prop_map(Node::Keys),
        blob().prop_map(Node::Blob),
        adjacent().prop_map(Node::Adjacent),
        tagged().prop_map(Node::Tagged),
        untagged().prop_map(Node::Untagged),
        flat().prop_map(Node::Flat),
    ];
    leaf.prop_recursive(5, 60, 5, |inner| {
        let boxed = inner.clone().prop_map(Box::new);
        prop_oneof![
            proptest::option::of(boxed.clone()).prop_map(Node::Maybe),
            proptest::collection::vec(inner.clone(), 0..5).prop_map(Node::List),
            proptest::collection::btree_map(any::<String>(), inner.clone(), 0..4).prop_map(Node::Map),
            ((inner.clone(), inner.clone()), any::<u8>()).prop_map(|(pair, n)| Node::Tuple(Box::new(pair), n)),
            (proptest::option::of(boxed), any::<u8>(), proptest::collection::vec(inner, 0..3))
                .prop_map(|(left, middle, right)| Node::Struct { left, middle, right }),
        ]
    })
}

#[test]
fn generated_nested_values_arrive_as_they_were_sent() {
    let queue = Queue::unbounded().unwrap();
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 2000,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let result = runner.run(&proptest::collection::vec(node(), 0..4), |sent| {
        queue.try_put(sent.clone()).unwrap();
        prop_assert_eq!(queue.try_get().unwrap(), sent);
        Ok(())
    });
    result.unwrap();
}
