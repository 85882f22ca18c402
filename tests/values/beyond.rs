//! Values that no serde format carries, because what their own serde code hands over lacks something. `docs/guide/values.md`
//! lists them; one that arrives unchanged after all makes the test fail.

use super::Ways;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Debug;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum WideUntagged {
    Number(i128),
    Text(String),
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct WideFlat {
    a: u8,
    #[serde(flatten)]
    rest: WideInner,
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct WideInner {
    n: u128,
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum SkippedVariant {
    Goes,
    #[serde(skip)]
    Stays,
    #[serde(skip_serializing)]
    StaysToo(u8),
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum UnreadVariant {
    Goes,
    #[serde(skip_deserializing)]
    Stays(u8),
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct SkipsInTuple(
    u8,
    #[serde(skip_serializing_if = "Option::is_none", default)] Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none", default)] Option<u8>,
);
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum PartOfTheOther {
    Small { a: u8 },
    Large { a: u8, b: u8 },
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct DoubleOption {
    #[serde(with = "serde_with::rust::double_option")]
    value: Option<Option<u8>>,
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct SplitRename {
    #[serde(rename(serialize = "out", deserialize = "in"))]
    value: u8,
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Forgets {
    kept: u8,
    #[serde(skip)]
    forgotten: u8,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum FitsTheOther {
    Byte(u8),
    Wide(u32),
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct FlatKeys<K: Ord> {
    a: u8,
    #[serde(flatten)]
    rest: BTreeMap<K, u8>,
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind")]
enum Tagged<K: Ord> {
    Flat(FlatKeys<K>),
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum Buffered {
    Value(ciborium::Value),
}

/// What two values that are equal to each other differ in.
fn beyond_in<T: super::Animal, U: PartialEq + Debug>(ways: &mut Ways, name: &str, value: &T, look: impl Fn(&T) -> U) {
    ways.sent += 1;
    let arrived = ways.by_queue(value).map(|arrived| look(&arrived));
    match arrived {
        Ok(arrived) if arrived != look(value) => {}
        arrived => ways.wrong.push(format!("{name} becomes {arrived:?}, but was to be changed")),
    }
}

pub(super) fn send(ways: &mut Ways) {
    ways.beyond("i128 beyond 64 bits in an untagged enum", WideUntagged::Number(i128::MIN), Some("128"));
    ways.beyond("u128 in a flattened struct", WideFlat { a: 1, rest: WideInner { n: u128::MAX } }, Some("128"));
    ways.beyond("a skipped variant", SkippedVariant::Stays, Some("SkippedVariant::Stays"));
    ways.beyond("a variant that is not serialised", SkippedVariant::StaysToo(1), Some("SkippedVariant::StaysToo"));
    ways.beyond("a variant that is not deserialised", UnreadVariant::Stays(1), Some("`Stays`"));
    ways.beyond("a tuple struct that skips in the middle", SkipsInTuple(1, None, Some(3)), None);
    ways.beyond(
        "an untagged variant that has all fields of an earlier one",
        PartOfTheOther::Large { a: 1, b: 2 },
        None,
    );
    ways.beyond("double_option without skip", DoubleOption { value: None }, None);
    ways.beyond("a field with two names", SplitRename { value: 1 }, Some("missing field `in`"));
    ways.beyond("a skipped field that is not its default", Forgets { kept: 1, forgotten: 2 }, None);
    ways.beyond("a flow label", SocketAddrV6::new(Ipv6Addr::LOCALHOST, 1, 5, 0), None);
    of_crates(ways);
    ways.beyond("an untagged variant whose content fits an earlier one", FitsTheOther::Wide(7), None);
    let key = FlatKeys { a: 1, rest: BTreeMap::from([(Some(()), 1)]) };
    ways.beyond("a key that is `Some(())` in what is flattened", key, Some("a key of a flattened map"));
    let error = Some("field identifier");
    let keys = FlatKeys { a: 1, rest: BTreeMap::from([(-1, 1)]) };
    ways.beyond("a signed key in what is flattened in a tagged enum", Tagged::Flat(keys), error);
    let keys = FlatKeys { a: 1, rest: BTreeMap::from([('c', 1)]) };
    ways.beyond("a character as such a key", Tagged::Flat(keys), error);
    let keys = FlatKeys { a: 1, rest: BTreeMap::from([(true, 1)]) };
    ways.beyond("a bool as such a key", Tagged::Flat(keys), error);
    let path = PathBuf::from(OsString::from_vec(vec![255]));
    ways.beyond("a path that is not UTF-8", path, Some("UTF-8"));
    let early = SystemTime::UNIX_EPOCH - Duration::from_secs(1);
    ways.beyond("a time before 1970", early, Some("UNIX_EPOCH"));
    let mut exhausted = 0..=0_u8;
    exhausted.next();
    ways.beyond("an exhausted range", exhausted, None);
}

fn of_crates(ways: &mut Ways) {
    use ndarray::ShapeBuilder;
    let by_columns = ndarray::Array2::from_shape_vec((2, 3).f(), vec![1, 2, 3, 4, 5, 6_i32]).unwrap();
    beyond_in(ways, "an array in column-major order", &by_columns, |array| array.strides().to_vec());
    assert_eq!(ways.by_queue(&by_columns).unwrap(), by_columns, "its elements arrive");
    let noon = chrono::NaiveDate::from_ymd_opt(2024, 2, 29).and_then(|day| day.and_hms_opt(12, 0, 0)).unwrap();
    let odd = noon.and_local_timezone(chrono::FixedOffset::east_opt(3601).unwrap()).unwrap();
    beyond_in(ways, "an offset with seconds", &odd, |time| time.offset().local_minus_utc());
    let null = || Box::new(ciborium::Value::Null);
    ways.beyond("a tag of CBOR", ciborium::Value::Tag(1, null()), None);
    ways.beyond("an extension of MessagePack", rmpv::Value::Ext(3, vec![1, 2]), None);
    let tagged: serde_yaml_ng::Value = serde_yaml_ng::from_str("!tag {a: 1}").unwrap();
    ways.beyond("a tag of YAML", tagged, None);
    let bytes = Buffered::Value(ciborium::Value::Bytes(b"abc".to_vec()));
    ways.beyond("bytes that are UTF-8 as a value of any kind in an untagged enum", bytes, None);
}
