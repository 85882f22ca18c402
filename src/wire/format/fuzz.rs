//! Bytes that are damaged, read as all kinds of types: for the test of this module and for `fuzz/`.

use super::{Parted, append, from_parted, from_slice};
use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

#[derive(Serialize, Deserialize, Clone)]
struct Record {
    id: u64,
    name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    parent: Option<Box<Record>>,
    kind: Kind,
    points: Vec<[f32; 3]>,
    pairs: Vec<(u32, f32)>,
    bytes: Vec<u8>,
    array: [u16; 20],
    by_name: BTreeMap<String, Option<Option<i8>>>,
}

#[derive(Serialize, Deserialize, Clone)]
enum Kind {
    Unit,
    Newtype(Option<()>),
    Tuple(i128, char),
    Struct { flag: bool, set: BTreeSet<i32> },
}

#[derive(Serialize, Deserialize, Clone)]
#[serde(tag = "type")]
enum Tagged {
    Leaf { value: f64 },
    Node { children: Vec<Tagged> },
}

#[derive(Serialize, Deserialize, Clone)]
#[serde(untagged)]
enum Any {
    Nothing(()),
    Flag(bool),
    Integer(i64),
    Float(f64),
    Text(String),
    List(Vec<Any>),
    Map(BTreeMap<String, Any>),
}

#[derive(Serialize, Deserialize, Clone)]
struct Flat {
    id: u8,
    #[serde(flatten)]
    rest: BTreeMap<String, Any>,
}

#[derive(Serialize, Deserialize, Clone, Copy)]
struct Sample {
    at: u64,
    pair: (f32, i8),
    is_valid: bool,
}

/// Asks for an option for ever.
#[derive(Serialize, Deserialize)]
struct Chain(Option<Box<Chain>>);

#[derive(Serialize, Deserialize)]
struct Borrowed<'a> {
    #[serde(borrow)]
    text: Option<&'a str>,
    bytes: &'a [u8],
}

/// Reads `bytes` as all kinds of types: each is an error, or a value that arrives as it is when it is sent on.
pub(crate) fn check(bytes: &[u8]) {
    let _ = from_slice::<IgnoredAny>(bytes);
    let _ = from_slice::<Borrowed<'_>>(bytes);
    for check in TYPES {
        check(bytes);
    }
}

/// [`check`] as one of its types.
pub(crate) fn check_one(bytes: &[u8], which: usize) {
    TYPES[which % TYPES.len()](bytes);
}

const TYPES: &[fn(&[u8])] = &[
    check_as::<Vec<Record>>,
    check_as::<Record>,
    check_as::<Tagged>,
    check_as::<Any>,
    check_as::<Flat>,
    check_as::<Vec<()>>,
    check_as::<(Vec<u64>, Vec<String>)>,
    check_as::<Vec<Vec<[i16; 2]>>>,
    check_as::<BTreeMap<Option<u8>, (Kind, f32)>>,
    check_as::<[Option<u8>; 3]>,
    check_as::<Vec<Sample>>,
    check_as::<Vec<(u16, f64)>>,
    check_as::<Vec<BTreeMap<String, Any>>>,
    check_as::<Vec<Chain>>,
];

fn check_as<T: Serialize + DeserializeOwned>(bytes: &[u8]) {
    let parted = from_parted::<T>(&mut Parted::receive(&bytes));
    let Ok(value) = from_slice::<T>(bytes) else {
        // A list of parts that are elsewhere makes no value out of a message that is none in one piece.
        return assert!(parted.is_err(), "{bytes:?} is a value only in parts");
    };
    if let Ok(parted) = parted {
        check_same(&value, &parted);
    }
    let (mut sent, mut again) = (Vec::new(), Vec::new());
    // A value that was read may be deeper than the limit for sending.
    if append(&value, &mut sent).is_err() {
        return;
    }
    let Ok(arrived) = from_slice::<T>(&sent) else { panic!("{sent:?} was sent and cannot be read") };
    append(&arrived, &mut again).unwrap_or_else(|error| panic!("{sent:?} cannot be sent again: {error}"));
    assert_eq!(sent, again);
    let arrived = from_parted::<T>(&mut Parted::receive(&&sent[..]));
    check_same(
        &value,
        &arrived.unwrap_or_else(|error| panic!("{sent:?} was sent and cannot be read in parts: {error}")),
    );
}

fn check_same<T: Serialize>(one: &T, other: &T) {
    let (mut first, mut second) = (Vec::new(), Vec::new());
    let written = (append(one, &mut first).is_ok(), append(other, &mut second).is_ok());
    assert!(written.0 == written.1 && (!written.0 || first == second), "{first:?} and {second:?}");
}

/// Messages to begin with.
pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let message = |append: &dyn Fn(&mut Vec<u8>) -> super::Result<()>| {
        let mut bytes = Vec::new();
        append(&mut bytes).unwrap_or_else(|error| panic!("a seed cannot be written: {error}"));
        bytes
    };
    let record = |parent| Record {
        id: 7,
        name: "a name".to_string(),
        parent,
        kind: Kind::Struct { flag: true, set: BTreeSet::from([1, -2]) },
        points: vec![[1.0, 2.0, 3.0]; 3],
        pairs: vec![(1, 2.0); 8],
        bytes: vec![0, 255, 1],
        array: [3; 20],
        by_name: BTreeMap::from([("x".to_string(), Some(None)), ("y".to_string(), Some(Some(1)))]),
    };
    let family = vec![record(None), record(Some(Box::new(record(None))))];
    let leaf = Tagged::Leaf { value: 0.5 };
    let nested = (0..12).fold(leaf.clone(), |inner, _| Tagged::Node { children: vec![inner, leaf.clone()] });
    let kinds = [Kind::Unit, Kind::Newtype(Some(())), Kind::Newtype(None), Kind::Tuple(i128::MIN, 'x')];
    let rest = BTreeMap::from([("more".to_string(), Any::List(vec![Any::Nothing(()), Any::Flag(true)]))]);
    let by_option: BTreeMap<_, _> =
        (0u8..).map(|key| key.checked_sub(1)).zip(kinds.map(|kind| (kind, 1.5f32))).collect();
    vec![
        message(&|to| append(&family, to)),
        message(&|to| append(&family[0], to)),
        message(&|to| append(&nested, to)),
        message(&|to| append(&Flat { id: 1, rest: rest.clone() }, to)),
        message(&|to| append(&vec![(); 5], to)),
        message(&|to| append(&(vec![1u64, u64::MAX], vec!["text"; 3]), to)),
        message(&|to| append(&vec![vec![[1i16, 2]; 2]; 2], to)),
        message(&|to| append(&by_option, to)),
        message(&|to| append(&[None, Some(1u8), None], to)),
        message(&|to| append(&[Sample { at: 1, pair: (2.0, 3), is_valid: true }; 20], to)),
        message(&|to| append(&vec![(1u16, 2.0f64); 9], to)),
        message(&|to| append(&Borrowed { text: Some("text"), bytes: b"bytes" }, to)),
    ]
}

/// Random numbers, always the same.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number less than `end`, or 0.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        self.next().checked_rem(end as u64).unwrap_or(0) as usize
    }
}

/// A seed, damaged in a few places.
pub(crate) fn damaged(seeds: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut bytes = seeds[random.below(seeds.len())].clone();
    for _ in 0..=random.below(4) {
        let (at, number) = (random.below(bytes.len()), random.next());
        match random.below(8) {
            0 | 1 => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << (number % 8)),
            2 | 3 => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte = (number % 30) as u8),
            4 => bytes.truncate(at),
            5 => {
                let huge = (number >> (number % 60)).to_le_bytes();
                bytes.iter_mut().skip(at).zip(huge).for_each(|(byte, huge)| *byte = huge);
            }
            6 => {
                let len = random.below(bytes.len() - at + 1);
                let part = bytes[at..at + len].to_vec();
                let to = random.below(bytes.len() + 1);
                bytes.splice(to..to, part);
            }
            _ => {
                let other = &seeds[random.below(seeds.len())];
                let from = random.below(other.len());
                let to = random.below(bytes.len() + 1);
                bytes.splice(to.., other[from..].iter().copied());
            }
        }
    }
    bytes
}
