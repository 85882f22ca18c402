//! Each class of values that a format by position, or one without marked options, changes.

use super::*;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fmt::Debug;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};

fn bytes_of<T: Serialize + ?Sized>(value: &T) -> Vec<u8> {
    let mut bytes = Vec::new();
    append(value, &mut bytes).unwrap();
    bytes
}

fn back<T: Serialize + DeserializeOwned>(value: &T) -> T {
    from_slice(&bytes_of(value)).unwrap()
}

#[track_caller]
fn same<T: Serialize + DeserializeOwned + PartialEq + Debug>(value: T) {
    let bytes = bytes_of(&value);
    let arrived: T = from_slice(&bytes).unwrap_or_else(|error| panic!("{value:?} as {bytes:?}: {error}"));
    assert_eq!(arrived, value, "as {bytes:?}");
    let arrived: T =
        from_parted(&mut Parted::receive(&&bytes[..])).unwrap_or_else(|error| panic!("{bytes:?}: {error}"));
    assert_eq!(arrived, value, "as {bytes:?}, in parts");
    // In the middle of others, too.
    let (before, arrived, after): (u8, T, u8) = from_slice(&bytes_of(&(1u8, &value, 2u8))).unwrap();
    assert_eq!((before, &arrived, after), (1, &value, 2));
    assert_eq!(back(&vec![Some(arrived)]), [Some(value)]);
}

mod options {
    use super::*;

    #[derive(Serialize, Deserialize, PartialEq, Debug, Clone, Copy)]
    struct Unit;
    #[derive(Serialize, Deserialize, PartialEq, Debug)]
    struct Newtype(Option<Option<()>>);
    #[derive(Serialize, Deserialize, PartialEq, Debug)]
    #[serde(transparent)]
    struct Transparent {
        inner: Option<Option<u8>>,
    }

    #[test]
    fn some_of_nothing_is_not_none() {
        same(Some(()));
        same(None::<()>);
        same([Some(None::<u8>), None, Some(Some(3))]);
        same(Some(Some(None::<String>)));
        same(Some(Unit));
        same(Some(serde_json::Value::Null));
        same((Box::new(Some(None::<u8>)), Newtype(Some(None)), Newtype(Some(Some(()))), Newtype(None)));
        same([Transparent { inner: Some(None) }, Transparent { inner: None }]);
        same(BTreeMap::from([(None, 1), (Some(None), 2), (Some(Some(())), 3)]));
        assert_eq!(*back(&Box::new(Some(None::<u8>))), Some(None));
    }

    #[test]
    fn options_are_read_as_their_content_where_that_was_asked_for() {
        assert_eq!(from_slice::<u32>(&bytes_of(&Some(5u32))).unwrap(), 5);
        assert_eq!(from_slice::<Option<u32>>(&bytes_of(&5u32)).unwrap(), Some(5));
        assert_eq!(from_slice::<String>(&bytes_of(&Some(Some("text")))).unwrap(), "text");
    }
}

mod fields {
    use super::*;

    #[derive(Serialize, Deserialize, PartialEq, Debug, Default, Clone)]
    struct Sparse {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        a: Option<u32>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        b: Option<u32>,
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        c: Vec<u32>,
    }

    #[derive(Serialize, Deserialize, PartialEq, Debug, Default)]
    #[serde(default)]
    struct Defaults {
        #[serde(skip_serializing)]
        unsent: u8,
        #[serde(skip_deserializing)]
        unread: u8,
        #[serde(skip)]
        skipped: u8,
        kept: u8,
    }

    #[derive(Serialize, Deserialize, PartialEq, Debug)]
    struct Renamed {
        #[serde(rename = "type")]
        kind: u8,
        #[serde(alias = "old", alias = "older")]
        new: String,
    }

    #[derive(Deserialize, PartialEq, Debug)]
    struct Wanted {
        c: Vec<u32>,
        a: Option<u32>,
    }

    #[derive(Serialize, Deserialize, PartialEq, Debug)]
    struct Empty {}

    #[test]
    fn fields_left_out_do_not_shift_their_neighbours() {
        for bits in 0..8u32 {
            let is = |bit: u32| bits & bit != 0;
            let c = if is(4) { vec![7; 3] } else { Vec::new() };
            same(Sparse { a: is(1).then_some(1), b: is(2).then_some(2), c });
        }
        let sent = Defaults { unsent: 1, unread: 2, skipped: 3, kept: 4 };
        assert_eq!(back(&sent), Defaults { unsent: 0, unread: 0, skipped: 0, kept: 4 });
    }

    #[test]
    fn fields_go_by_their_names() {
        same(Renamed { kind: 1, new: "new".to_string() });
        let sparse = Sparse { a: Some(1), b: Some(2), c: vec![3] };
        assert_eq!(from_slice::<Wanted>(&bytes_of(&sparse)).unwrap(), Wanted { c: vec![3], a: Some(1) });
        let map: BTreeMap<String, serde_json::Value> = from_slice(&bytes_of(&sparse)).unwrap();
        assert_eq!(map.keys().collect::<Vec<_>>(), ["a", "b", "c"]);
        same((Empty {}, [(); 3], Vec::<Empty>::new()));
    }

    #[test]
    fn any_number_of_shapes_fits_one_message() {
        struct Numbered(u32);
        const NAMES: [&str; 17] = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n", "o", "p", "q"];
        impl Serialize for Numbered {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
                use serde::ser::SerializeStruct;
                let mut fields = serializer.serialize_struct("Numbered", NAMES.len())?;
                for (bit, name) in NAMES.iter().enumerate().filter(|(bit, _)| self.0 >> bit & 1 != 0) {
                    fields.serialize_field(name, &(bit as u8))?;
                }
                fields.end()
            }
        }
        let all: Vec<_> = (0..70_000).map(Numbered).collect();
        let bytes = bytes_of(&all);
        assert!(!ser::has_kept(), "a thread keeps no names of so many");
        let read: Vec<BTreeMap<String, u8>> = from_slice(&bytes).unwrap();
        for (number, map) in read.iter().enumerate() {
            assert_eq!(map.values().map(|bit| 1 << bit).sum::<usize>(), number);
        }
        // The next message begins anew.
        same(Sparse::default());
        assert!(ser::has_kept());
    }

    #[derive(Serialize, Deserialize, PartialEq, Debug)]
    struct Pair<T> {
        a: T,
        b: T,
    }

    /// A visitor around another, as crates have them that look at what is read, which takes maps only.
    struct MapsOnly<V>(V);

    impl<'de, V: serde::de::Visitor<'de>> serde::de::Visitor<'de> for MapsOnly<V> {
        type Value = V::Value;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            self.0.expecting(f)
        }
        fn visit_map<A: serde::de::MapAccess<'de>>(self, map: A) -> std::result::Result<V::Value, A::Error> {
            self.0.visit_map(map)
        }
    }

    struct Wrapping<D>(D);

    impl<'de, D: serde::Deserializer<'de>> serde::Deserializer<'de> for Wrapping<D> {
        type Error = D::Error;
        fn deserialize_any<V: serde::de::Visitor<'de>>(self, visitor: V) -> std::result::Result<V::Value, D::Error> {
            self.0.deserialize_any(MapsOnly(visitor))
        }
        fn deserialize_struct<V: serde::de::Visitor<'de>>(
            self,
            name: &'static str,
            fields: &'static [&'static str],
            visitor: V,
        ) -> std::result::Result<V::Value, D::Error> {
            self.0.deserialize_struct(name, fields, MapsOnly(visitor))
        }
        serde::forward_to_deserialize_any! {
            bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
            newtype_struct seq tuple tuple_struct map enum identifier ignored_any
        }
    }

    #[derive(Serialize, PartialEq, Debug)]
    #[serde(transparent)]
    struct Watched<T>(T);

    impl<'de, T: Deserialize<'de>> Deserialize<'de> for Watched<T> {
        fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
            T::deserialize(Wrapping(deserializer)).map(Self)
        }
    }

    #[test]
    fn a_visitor_around_one_that_serde_derived_gets_a_map() {
        same(Watched(Empty {}));
        same(Watched(Pair { a: 1u8, b: 2 }));
        same(Watched(Pair { a: Some(Pair { a: 1u8, b: 2 }), b: None }));
        same(Pair { a: Pair { a: vec![1u8], b: vec![] }, b: Pair { a: vec![], b: vec![2] } });
    }

    #[test]
    fn a_visitor_that_takes_maps_only_gets_one() {
        #[derive(Debug, PartialEq)]
        struct ByHand(u8, u8);
        impl Serialize for ByHand {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
                use serde::ser::SerializeStruct;
                let mut fields = serializer.serialize_struct("ByHand", 2)?;
                fields.serialize_field("x", &self.0)?;
                fields.serialize_field("y", &self.1)?;
                fields.end()
            }
        }
        impl<'de> Deserialize<'de> for ByHand {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
                struct Visitor;
                impl<'de> serde::de::Visitor<'de> for Visitor {
                    type Value = ByHand;
                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str("a map")
                    }
                    fn visit_map<A: serde::de::MapAccess<'de>>(
                        self,
                        mut map: A,
                    ) -> std::result::Result<ByHand, A::Error> {
                        let mut got = BTreeMap::<String, u8>::new();
                        while let Some((name, value)) = map.next_entry()? {
                            got.insert(name, value);
                        }
                        Ok(ByHand(got["x"], got["y"]))
                    }
                }
                deserializer.deserialize_struct("ByHand", &["x", "y"], Visitor)
            }
        }
        same(vec![ByHand(1, 2), ByHand(3, 4)]);
    }
}

mod variants {
    use super::*;

    #[derive(Serialize, Deserialize, PartialEq, Debug)]
    enum Plain {
        Unit,
        #[serde(skip)]
        #[allow(dead_code)]
        Never,
        Newtype(Option<()>),
        Tuple(u8, String),
        Struct {
            x: u8,
            #[serde(default, skip_serializing_if = "Option::is_none")]
            y: Option<u8>,
        },
        #[serde(rename = "last", alias = "final")]
        Last,
    }

    #[derive(Serialize, Deserialize, PartialEq, Debug)]
    #[serde(untagged)]
    enum Untagged {
        Circle { radius: f64 },
        Square { side: f64 },
        List(Vec<i32>),
        Point { x: i32, y: i32 },
        Text(String),
        Nothing,
    }

    #[derive(Serialize, Deserialize, PartialEq, Debug)]
    #[serde(untagged)]
    enum TextOrBytes {
        Text(String),
        Bytes(#[serde(with = "bytes_as_bytes")] Vec<u8>),
    }

    mod bytes_as_bytes {
        use super::*;
        pub(super) fn serialize<S: serde::Serializer>(
            bytes: &[u8],
            serializer: S,
        ) -> std::result::Result<S::Ok, S::Error> {
            serializer.serialize_bytes(bytes)
        }
        pub(super) fn deserialize<'de, D: serde::Deserializer<'de>>(
            deserializer: D,
        ) -> std::result::Result<Vec<u8>, D::Error> {
            bytes::Bytes::deserialize(deserializer).map(Vec::from)
        }
    }

    #[derive(Serialize, Deserialize, PartialEq, Debug)]
    #[serde(tag = "type")]
    struct Tagged {
        x: Option<u8>,
    }

    #[derive(Serialize, Deserialize, PartialEq, Debug)]
    #[serde(tag = "t", content = "c")]
    enum Adjacent {
        Unit,
        Newtype(Option<u8>),
        Tuple(u8, Option<()>),
        Struct { x: u8, at: IpAddr },
    }

    #[derive(Serialize, Deserialize, PartialEq, Debug)]
    #[serde(tag = "t")]
    enum Internal {
        Unit,
        Newtype(Inner),
        Struct { x: Option<u8>, at: IpAddr },
    }

    #[derive(Serialize, Deserialize, PartialEq, Debug)]
    struct Inner {
        at: IpAddr,
        more: Option<Vec<f32>>,
    }

    #[derive(Serialize, Deserialize, PartialEq, Debug)]
    struct Flat {
        before: u8,
        #[serde(flatten)]
        inner: Inner,
        #[serde(flatten)]
        rest: BTreeMap<String, serde_json::Value>,
    }

    #[derive(Serialize, Deserialize, PartialEq, Debug)]
    struct FlatKeys<K: Ord> {
        a: u8,
        #[serde(flatten)]
        rest: BTreeMap<K, u8>,
    }

    #[test]
    fn keys_of_a_flattened_map_arrive_or_are_refused() {
        fn with<K: Ord>(key: K) -> FlatKeys<K> {
            FlatKeys { a: 1, rest: BTreeMap::from([(key, 2)]) }
        }
        same(with(Some(3u8)));
        same(with(None::<u8>));
        same(with(None::<()>));
        same(with('x'));
        same(with(7u32));
        fn refused<K: Ord + Serialize + DeserializeOwned>(key: K) {
            let error = from_slice::<FlatKeys<K>>(&bytes_of(&with(key))).err().expect("it would arrive changed");
            assert!(error.to_string().contains("a key of a flattened map"), "{error}");
        }
        refused(Some(()));
        refused(Some(Some(())));
        refused(Some(None::<u8>));
        refused(Some(Some(1u8)));
    }

    #[test]
    fn a_variant_that_comes_as_a_map_is_its_only_entry() {
        #[derive(Deserialize, PartialEq, Debug)]
        enum Read {
            A(u8),
        }
        #[derive(Serialize)]
        struct One {
            #[serde(rename = "A")]
            a: u8,
        }
        #[derive(Serialize)]
        struct Two {
            #[serde(rename = "A")]
            a: u8,
            b: u8,
        }
        assert_eq!(from_slice::<Read>(&bytes_of(&One { a: 1 })).unwrap(), Read::A(1));
        assert_eq!(from_slice::<Read>(&bytes_of(&BTreeMap::from([("A", 1u8)]))).unwrap(), Read::A(1));
        assert!(from_slice::<Read>(&bytes_of(&Two { a: 1, b: 2 })).is_err());
        assert!(from_slice::<Read>(&bytes_of(&BTreeMap::from([("A", 1u8), ("B", 2)]))).is_err());
        // Read as one of several, too.
        assert!(from_slice::<(Read, u8, u8)>(&bytes_of(&(Two { a: 1, b: 2 }, 3u8))).is_err());
    }

    fn inner() -> Inner {
        Inner { at: "10.0.0.1".parse().unwrap(), more: Some(vec![0.1, 2.0]) }
    }

    #[test]
    fn variants_go_by_their_names() {
        same(vec![
            Plain::Unit,
            Plain::Newtype(None),
            Plain::Newtype(Some(())),
            Plain::Tuple(1, "two".to_string()),
            Plain::Struct { x: 1, y: None },
            Plain::Struct { x: 1, y: Some(2) },
            Plain::Last,
        ]);
        same(HashMap::from([(Some(1u8), Ok::<u8, String>(1)), (None, Err("no".to_string()))]));
    }

    #[test]
    fn untagged_variants_are_distinguished() {
        same(vec![
            Untagged::Circle { radius: 1.0 },
            Untagged::Square { side: 2.0 },
            Untagged::List(vec![1, 2]),
            Untagged::Point { x: 1, y: 2 },
            Untagged::Text("text".to_string()),
            Untagged::Nothing,
        ]);
        let bytes = [b"text".to_vec(), vec![255, 254], Vec::new()].map(TextOrBytes::Bytes);
        same(Vec::from(bytes));
        same(TextOrBytes::Text("text".to_string()));
    }

    #[test]
    fn tags_and_flattened_fields_come_back() {
        same(Tagged { x: None });
        same(vec![
            Adjacent::Unit,
            Adjacent::Newtype(None),
            Adjacent::Newtype(Some(1)),
            Adjacent::Tuple(1, Some(())),
            Adjacent::Struct { x: 1, at: "::1".parse().unwrap() },
        ]);
        same(vec![
            Internal::Unit,
            Internal::Newtype(inner()),
            Internal::Struct { x: Some(1), at: "::1".parse().unwrap() },
        ]);
        let rest = BTreeMap::from([("extra".to_string(), serde_json::json!([1, null, {"a": "b"}]))]);
        same(Flat { before: 1, inner: inner(), rest });
    }
}

/// Code of users that does what serde permits and hardly anybody does.
mod odd {
    use super::*;
    use serde::Serializer;
    use serde::ser::{SerializeMap, SerializeSeq, SerializeStruct, SerializeTuple};
    use std::marker::PhantomData;

    type Written<S> = Result<<S as Serializer>::Ok, <S as Serializer>::Error>;

    /// Leaves out what cannot be written, where an error should end it all.
    struct Swallows;
    impl Serialize for Swallows {
        fn serialize<S: Serializer>(&self, serializer: S) -> Written<S> {
            struct Fails;
            impl Serialize for Fails {
                fn serialize<S: Serializer>(&self, serializer: S) -> Written<S> {
                    let mut tuple = serializer.serialize_tuple(2)?;
                    tuple.serialize_element(&1u8)?;
                    Err(serde::ser::Error::custom("on purpose"))
                }
            }
            let mut seq = serializer.serialize_seq(None)?;
            seq.serialize_element(&"before")?;
            let _ = seq.serialize_element(&Fails);
            seq.serialize_element(&"after")?;
            seq.end()
        }
    }

    #[test]
    fn failed_part_fails_the_whole_though_its_error_is_swallowed() {
        for error in [append(&Swallows, &mut Vec::new()), append(&vec![(1u8, Swallows)], &mut Vec::new())] {
            assert!(error.unwrap_err().to_string().contains("went on after a part of it"));
        }
        same(1u8);
    }

    /// Says how many elements there will be, and is wrong.
    #[derive(PartialEq, Debug, Clone)]
    struct Lies(Vec<(u16, u8)>, usize);
    impl Serialize for Lies {
        fn serialize<S: Serializer>(&self, serializer: S) -> Written<S> {
            let mut seq = serializer.serialize_seq(Some(self.1))?;
            self.0.iter().try_for_each(|element| seq.serialize_element(element))?;
            seq.end()
        }
    }

    #[test]
    fn counts_are_counted() {
        for (len, said) in [(0, 9), (1, usize::MAX), (2, 8), (9, 0), (20, 1), (20, usize::MAX), (300, 8)] {
            let elements: Vec<_> = (0..len).map(|n| (n as u16, 1)).collect();
            let read: Vec<(u16, u8)> = from_slice(&bytes_of(&Lies(elements.clone(), said))).unwrap();
            assert_eq!(read, elements, "{len} elements, {said} were said");
            let nested: Vec<Vec<(u16, u8)>> = from_slice(&bytes_of(&vec![Lies(elements.clone(), said); 9])).unwrap();
            assert_eq!(nested, vec![elements; 9]);
        }
    }

    /// A struct without fields, a variant and a struct of the same name, in one message.
    #[derive(Serialize, Deserialize, PartialEq, Debug, Clone)]
    enum Same {
        Same,
        Other { same: u8 },
    }
    #[derive(Serialize, Deserialize, PartialEq, Debug, Clone)]
    #[serde(rename = "Same")]
    struct Empty {}
    #[derive(Serialize, Deserialize, PartialEq, Debug, Clone)]
    #[serde(rename = "")]
    struct Nameless {
        #[serde(rename = "")]
        field: u8,
    }

    #[test]
    fn names_that_are_equal_or_empty_are_distinguished() {
        same((Empty {}, Same::Same, Empty {}, Same::Other { same: 1 }, Nameless { field: 1 }));
        same(vec![(Nameless { field: 1 }, Empty {}); 20]);
        same((PhantomData::<u8>, [(); 20], vec![PhantomData::<u8>; 20], vec![[0u8; 0]; 20], vec![Empty {}; 20]));
    }

    #[test]
    fn the_bits_of_numbers_that_are_none_arrive() {
        let (narrow, wide) = (f32::from_bits(0x7fa1_2345), f64::from_bits(0xfff4_5678_9abc_def0));
        #[derive(Serialize, Deserialize, Clone)]
        struct Holds {
            narrow: f32,
            #[serde(flatten)]
            rest: BTreeMap<String, f64>,
        }
        let bits = |(a, b): &(f32, f64)| (a.to_bits(), b.to_bits());
        let pairs = vec![(narrow, wide), (-0.0, -0.0), (narrow, f64::NAN)];
        for pairs in [pairs.clone(), pairs.repeat(9)] {
            assert!(back(&pairs).iter().map(bits).eq(pairs.iter().map(bits)));
        }
        let lists = back(&(vec![narrow; 3], vec![Some(wide); 3], [narrow; 20]));
        assert!(lists.0.iter().chain(&lists.2).all(|number| number.to_bits() == narrow.to_bits()));
        assert!(lists.1.iter().flatten().all(|number| number.to_bits() == wide.to_bits()));
        let held = back(&Holds { narrow, rest: BTreeMap::from([("x".to_string(), wide)]) });
        assert_eq!((held.narrow.to_bits(), held.rest["x"].to_bits()), (narrow.to_bits(), wide.to_bits()));
    }

    #[test]
    fn numbers_of_128_bits_arrive_wherever_serde_hands_them_over() {
        let ends = [i128::MIN, -1, 0, 1, i128::MAX];
        same(ends.map(Some));
        same(ends.to_vec().repeat(5));
        same(ends.map(|n| (n, n as u128)).to_vec().repeat(5));
        same(BTreeMap::from(ends.map(|n| (n, (n as u128, n)))));
    }

    /// Its keys are integers, and those of some fields with it.
    #[derive(Serialize, Deserialize, PartialEq, Debug)]
    struct ByNumber {
        zero: u8,
        one: u8,
        #[serde(flatten)]
        rest: BTreeMap<u32, String>,
    }
    #[derive(Serialize, Deserialize, PartialEq, Debug, Clone)]
    #[serde(untagged)]
    enum Outer {
        Tagged(Middle),
        List(Vec<Outer>),
        Char(char),
    }
    #[derive(Serialize, Deserialize, PartialEq, Debug, Clone)]
    struct Middle {
        at: u8,
        #[serde(flatten)]
        kind: Kind,
    }
    #[derive(Serialize, Deserialize, PartialEq, Debug, Clone)]
    #[serde(tag = "kind")]
    enum Kind {
        Unit,
        Newtype(Inner),
        Struct { deep: Option<Box<Outer>>, pair: (u8, Option<()>) },
    }
    #[derive(Serialize, Deserialize, PartialEq, Debug, Clone)]
    struct Inner {
        points: Vec<(f32, u8)>,
        unit: (),
        #[serde(skip_serializing_if = "Option::is_none", default)]
        option: Option<Option<u8>>,
    }

    #[test]
    fn values_buffered_by_serde_arrive() {
        same(ByNumber { zero: 7, one: 8, rest: BTreeMap::from([(0, "a".to_string()), (1, "b".to_string())]) });
        let unit = Outer::Tagged(Middle { at: 1, kind: Kind::Unit });
        let inner = |option| Inner { points: vec![(1.5, 2); 12], unit: (), option };
        let newtype = |option| Outer::Tagged(Middle { at: 2, kind: Kind::Newtype(inner(option)) });
        let list = Outer::List(vec![Outer::Char('x'), unit.clone(), newtype(Some(Some(1)))]);
        let deep = Kind::Struct { deep: Some(Box::new(list.clone())), pair: (1, Some(())) };
        let shallow = Kind::Struct { deep: None, pair: (1, None) };
        same(vec![
            unit,
            newtype(None),
            newtype(Some(Some(3))),
            list,
            Outer::Tagged(Middle { at: 3, kind: deep }),
            Outer::Tagged(Middle { at: 4, kind: shallow }),
        ]);
    }

    /// Fields that come twice, not at all, or in another order than announced.
    struct Fields(&'static [&'static str]);
    impl Serialize for Fields {
        fn serialize<S: Serializer>(&self, serializer: S) -> Written<S> {
            let mut fields = serializer.serialize_struct("Fields", 2)?;
            self.0.iter().try_for_each(|name| fields.serialize_field(name, &(name.len() as u8)))?;
            fields.end()
        }
    }
    /// Keys and values of several types, which come in two calls.
    struct Mixed;
    impl Serialize for Mixed {
        fn serialize<S: Serializer>(&self, serializer: S) -> Written<S> {
            let mut map = serializer.serialize_map(Some(77))?;
            map.serialize_key(&Some('c'))?;
            map.serialize_value(&[1u8; 20])?;
            map.serialize_entry(&None::<char>, &vec![(1u8, 2u8); 20])?;
            map.end()
        }
    }

    #[test]
    fn fields_and_entries_that_come_as_they_like_are_read_by_name() {
        #[derive(Deserialize, PartialEq, Debug)]
        struct Read {
            b: u8,
            ccc: u8,
        }
        let read = |fields| from_slice::<Read>(&bytes_of(&[Fields(fields)]));
        let one = |fields| {
            from_slice::<Vec<Read>>(&bytes_of(&std::iter::repeat_n(fields, 12).map(Fields).collect::<Vec<_>>()))
        };
        assert!(read(&["b", "ccc"]).is_err(), "a list is no struct");
        for fields in [&["b", "ccc"][..], &["ccc", "b"], &["ccc", "dd", "b"]] {
            assert!(one(fields).unwrap().iter().all(|read| *read == Read { b: 1, ccc: 3 }));
        }
        assert!(one(&["b", "b", "ccc"]).is_err() && one(&["b"]).is_err() && one(&[]).is_err());
        let map: BTreeMap<Option<char>, Vec<serde_json::Value>> = from_slice(&bytes_of(&Mixed)).unwrap();
        assert_eq!((map[&Some('c')].len(), map[&None].len(), &map[&None][0]), (20, 20, &serde_json::json!([1, 2])));
    }
}

mod readable {
    use super::*;

    #[test]
    fn addresses_keep_their_scope() {
        let scoped: SocketAddrV6 = "[fe80::1%7]:80".parse().unwrap();
        same(scoped);
        same(SocketAddr::V6(scoped));
    }

    /// As crates of other formats have it: text and bytes are two things.
    #[derive(PartialEq, Debug, Clone)]
    enum Anything {
        Text(String),
        Bytes(Vec<u8>),
        List(Vec<Anything>),
        Number(u64),
    }

    impl Serialize for Anything {
        fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
            match self {
                Self::Text(text) => text.serialize(serializer),
                Self::Bytes(bytes) => serializer.serialize_bytes(bytes),
                Self::List(list) => list.serialize(serializer),
                Self::Number(number) => number.serialize(serializer),
            }
        }
    }

    impl<'de> Deserialize<'de> for Anything {
        fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
            struct Visitor;
            impl<'de> serde::de::Visitor<'de> for Visitor {
                type Value = Anything;
                fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    f.write_str("anything")
                }
                fn visit_u64<E>(self, number: u64) -> std::result::Result<Anything, E> {
                    Ok(Anything::Number(number))
                }
                fn visit_str<E>(self, text: &str) -> std::result::Result<Anything, E> {
                    Ok(Anything::Text(text.to_string()))
                }
                fn visit_bytes<E>(self, bytes: &[u8]) -> std::result::Result<Anything, E> {
                    Ok(Anything::Bytes(bytes.to_vec()))
                }
                fn visit_seq<A: serde::de::SeqAccess<'de>>(
                    self,
                    mut seq: A,
                ) -> std::result::Result<Anything, A::Error> {
                    let mut list = Vec::new();
                    while let Some(element) = seq.next_element()? {
                        list.push(element);
                    }
                    Ok(Anything::List(list))
                }
            }
            deserializer.deserialize_any(Visitor)
        }
    }

    #[test]
    fn bytes_stay_bytes_for_a_type_that_takes_anything() {
        let all = [&b"abc"[..], b"", b"\xff"].map(|bytes| Anything::Bytes(bytes.to_vec()));
        same(Anything::List(all.to_vec()));
        all.into_iter().for_each(same);
        same(Anything::List(vec![Anything::Text("abc".to_string()), Anything::Number(1)]));
    }

    #[test]
    fn types_that_speak_to_their_own_format_only_come_back() {
        let raw = serde_json::value::RawValue::from_string(r#"{"a": 1.0}"#.to_string()).unwrap();
        assert_eq!(back(&raw).get(), raw.get());
        same(serde_json::json!({"a": [1, -2, 3.5, "x", null, true], "b": {}}));
    }
}

mod runs {
    use super::*;

    #[derive(Serialize, Deserialize, PartialEq, Debug)]
    struct Mixed {
        name: String,
        bytes: Vec<u8>,
        floats: Vec<f64>,
        points: Vec<[f32; 3]>,
        pairs: Vec<(u32, f32)>,
        flags: Vec<bool>,
        array: [u16; 20],
        deque: VecDeque<i64>,
        set: BTreeSet<u32>,
        sizes: Vec<usize>,
        boxed: Box<[i8]>,
    }

    #[test]
    fn numbers_lie_in_memory_wherever_they_stand() {
        let mixed = Mixed {
            name: "mixed".to_string(),
            bytes: vec![0, 255],
            floats: vec![f64::MAX, -0.0],
            points: vec![[1.0, 2.0, 3.0]; 5],
            pairs: vec![(1, 2.0), (3, 4.0)],
            flags: vec![true, false],
            array: [9; 20],
            deque: (0..300).collect(),
            set: (0..5).collect(),
            sizes: vec![usize::MAX, 0],
            boxed: Box::new([-1, 1]),
        };
        same(vec![back(&mixed), mixed]);
        same((vec![[1u64, 2]; 3], vec![[1i8; 4]; 3], Vec::<[f64; 3]>::new(), vec![vec![1u32], vec![]]));
        let many = vec![1.0f64; 1000];
        // With the list of its large parts.
        assert!(bytes_of(&(0u8, &many)).len() < 8 * 1000 + 64);
    }

    #[test]
    fn a_run_that_turns_out_to_be_none_is_undone() {
        same((1u8, 2u8, 3u8, 4u8, "five".to_string(), 6u64));
        struct Uneven(bool);
        impl Serialize for Uneven {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
                use serde::ser::SerializeSeq;
                let mut elements = serializer.serialize_seq(None)?;
                elements.serialize_element(&1u32)?;
                elements.serialize_element(&2u32)?;
                if self.0 {
                    elements.serialize_element("three")?;
                }
                elements.serialize_element(&4u16)?;
                elements.end()
            }
        }
        let read: Vec<serde_json::Value> = from_slice(&bytes_of(&Uneven(true))).unwrap();
        assert_eq!(read, serde_json::from_str::<Vec<serde_json::Value>>("[1, 2, \"three\", 4]").unwrap());
        assert_eq!(from_slice::<Vec<u64>>(&bytes_of(&Uneven(false))).unwrap(), [1, 2, 4]);
    }

    #[derive(Serialize, Deserialize, PartialEq, Debug, Clone)]
    struct Sample {
        at: u64,
        place: [f32; 3],
        kind: Newtype,
        is_valid: bool,
    }
    #[derive(Serialize, Deserialize, PartialEq, Debug, Clone)]
    struct Newtype(i128);
    #[derive(Serialize, Deserialize, PartialEq, Debug, Clone)]
    struct Sparse {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        first: Option<u8>,
        #[serde(default, skip_serializing_if = "is_zero")]
        second: u8,
        #[serde(default, skip_serializing_if = "is_zero")]
        third: u8,
    }
    #[derive(Serialize, Deserialize, PartialEq, Debug, Clone)]
    #[serde(untagged)]
    enum Either {
        Pair(u8, u16),
        Named { x: u8, y: u16 },
        Text(String),
        Deep((((((u8,),),),),)),
    }

    fn is_zero(number: &u8) -> bool {
        *number == 0
    }

    fn sample(at: u64) -> Sample {
        Sample {
            at,
            place: [0.5, -0.0, at as f32],
            kind: Newtype(i128::MIN + i128::from(at)),
            is_valid: at.is_multiple_of(3),
        }
    }

    #[test]
    fn rows_of_numbers_lie_without_tags() {
        let samples: Vec<_> = (0..1000).map(sample).collect();
        assert!(bytes_of(&samples).len() < 1000 * (8 + 12 + 16 + 1) + 128);
        for count in [0, 1, 2, 7, 8, 9, 1000] {
            same(samples[..count].to_vec());
        }
        same(vec![true, false, true, true, false, false, true, false, true]);
        same(vec![(1u32, 2.0f32); 500]);
        same((vec![vec![(1u8, 'x'); 9]; 9], vec![vec![(1u8, 2u64); 9]; 9], vec![((), ()); 9], vec![[0u8; 0]; 9]));
        same(vec![[[1.5f32; 4]; 4]; 9]);
        same((0..20u16).map(|n| (n, n)).collect::<BTreeMap<_, _>>());
        same((0..20u16).map(|n| (n, n)).collect::<BTreeSet<_>>());
    }

    #[test]
    fn rows_are_read_by_types_that_ask_for_something_else() {
        let samples: Vec<_> = (0..10).map(|at| (at, at as f32)).collect::<Vec<(u64, f32)>>();
        let expected = serde_json::to_value(&samples).unwrap();
        assert_eq!(from_slice::<serde_json::Value>(&bytes_of(&samples)).unwrap(), expected);
        let named = vec![Either::Named { x: 1, y: 2 }; 9];
        assert_eq!(back(&named), named);
        let map: Vec<HashMap<String, u64>> = from_slice(&bytes_of(&named)).unwrap();
        assert_eq!(map, vec![HashMap::from([("x".to_string(), 1), ("y".to_string(), 2)]); 9]);
        let swapped: Vec<(u8, u8)> = from_slice(&bytes_of(&samples))
            .map(|v: Vec<(u8, f64)>| v.iter().map(|p| (p.0, p.1 as u8)).collect())
            .unwrap();
        assert_eq!(swapped[9], (9, 9));
        assert!(from_slice::<Vec<(u64,)>>(&bytes_of(&samples)).is_err());
        assert!(from_slice::<Vec<(u64, f32, f32)>>(&bytes_of(&samples)).is_err());
        assert_eq!(
            from_slice::<Vec<Option<(u64, Option<f32>)>>>(&bytes_of(&samples)).unwrap()[3],
            Some((3, Some(3.0)))
        );
    }

    /// A pair that reads its second number as a number or, depending on the first, as a list of one, or swaps the names of a struct.
    #[derive(PartialEq, Debug)]
    struct Fickle(u8, u8);

    impl<'de> Deserialize<'de> for Fickle {
        fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
            struct Pair;
            impl<'de> serde::de::Visitor<'de> for Pair {
                type Value = Fickle;
                fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                    f.write_str("a pair")
                }
                fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Fickle, A::Error> {
                    let first: u8 = seq.next_element()?.unwrap();
                    let second = match first {
                        0 => seq.next_element::<u8>()?.unwrap(),
                        1 => seq.next_element::<u16>()?.unwrap() as u8,
                        2 => seq.next_element::<Option<u8>>()?.unwrap().unwrap(),
                        3 => seq.next_element::<Newtype8>()?.unwrap().0,
                        _ => seq.next_element::<(u8,)>()?.unwrap().0,
                    };
                    Ok(Fickle(first, second))
                }
            }
            deserializer.deserialize_tuple(2, Pair)
        }
    }

    #[derive(Deserialize)]
    struct Newtype8(u8);

    #[test]
    fn rows_of_a_type_that_asks_by_value_arrive() {
        let read = |firsts: &[u8]| {
            let pairs: Vec<_> = firsts.iter().map(|first| (*first, 9u8)).collect();
            let right: Vec<_> = firsts.iter().map(|first| Fickle(*first, 9)).collect();
            from_slice::<Vec<Fickle>>(&bytes_of(&pairs)).map(|read| assert_eq!(read, right)).is_ok()
        };
        assert!(
            read(&[0; 12]) && read(&[3; 12]) && read(&[1; 12]) && read(&[2; 12]) && read(&[0, 3, 0, 3, 0, 3, 0, 3])
        );
        assert!(read(&[1, 0, 0, 0, 1, 2, 3, 0, 0]), "the first row is read by the template, and so are all");
        // A number is no list of one; whatever else a type may ask for, it gets as it does for a value that is no row.
        for (other, is_right) in [(1, true), (2, true), (3, true), (4, false)] {
            for at in 0..12 {
                let mut firsts = [0; 12];
                firsts[at] = other;
                assert_eq!(read(&firsts), is_right, "{firsts:?}");
            }
        }
    }

    /// Written as a pair, of which the second part counts depending on the first.
    #[derive(PartialEq, Debug, Clone)]
    struct Maybe(Option<u32>);

    impl Serialize for Maybe {
        fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
            (self.0.is_some(), self.0.unwrap_or(0)).serialize(serializer)
        }
    }

    impl<'de> Deserialize<'de> for Maybe {
        fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
            struct Pair;
            impl<'de> serde::de::Visitor<'de> for Pair {
                type Value = Maybe;
                fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                    f.write_str("a pair")
                }
                fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Maybe, A::Error> {
                    if seq.next_element::<bool>()?.unwrap() {
                        return Ok(Maybe(seq.next_element()?));
                    }
                    seq.next_element::<serde::de::IgnoredAny>()?;
                    Ok(Maybe(None))
                }
            }
            deserializer.deserialize_tuple(2, Pair)
        }
    }

    #[test]
    fn rows_whose_parts_are_ignored_by_value_arrive() {
        for bits in 0..1 << 10 {
            let list: Vec<_> = (0..10).map(|n| Maybe((bits >> n & 1 == 1).then_some(n))).collect();
            assert_eq!(back(&list), list);
        }
        let mut list = vec![Maybe(Some(1)); 12];
        list[5] = Maybe(None);
        same((list.clone(), vec![list; 3]));
    }

    /// Whether it is read from the message itself, where a descriptor can be taken instead of being copied.
    #[derive(Debug)]
    struct Once(bool);

    impl<'de> Deserialize<'de> for Once {
        fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
            u32::deserialize(deserializer).map(|_| Self(reads_once::<D>()))
        }
    }

    #[test]
    fn rows_and_buffers_may_be_read_again_and_the_rest_is_read_once() {
        #[derive(Serialize, Clone)]
        struct Index(u32);
        let once: (u8, Once) = from_slice(&bytes_of(&(1u8, Index(1)))).unwrap();
        assert!(once.1.0);
        let once: Vec<Once> = from_slice(&bytes_of(&vec![Index(1); 12])).unwrap();
        // The first row shows how the others can be read at once, and each of these is read again if it asks for something else.
        assert!(once.len() == 12 && once.iter().enumerate().all(|(at, once)| once.0 == (at == 0)), "{once:?}");
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Buffered {
            Once(Once),
        }
        let Buffered::Once(once) = from_slice(&bytes_of(&1u32)).unwrap();
        assert!(!once.0, "serde's own buffer may be read again");
    }

    /// Three numbers whose visitor trusts the length that it is told, as that of arrays of other crates does, and takes what it asked
    /// for alone.
    #[derive(Debug, PartialEq, Clone)]
    struct Strict([u128; 3]);

    #[derive(Debug, PartialEq, Clone, Copy)]
    struct Wide(u128);

    impl<'de> Deserialize<'de> for Wide {
        fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
            struct Wides;
            impl serde::de::Visitor<'_> for Wides {
                type Value = Wide;
                fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                    f.write_str("a number of 128 bits")
                }
                fn visit_u128<E>(self, number: u128) -> std::result::Result<Wide, E> {
                    Ok(Wide(number))
                }
            }
            deserializer.deserialize_u128(Wides)
        }
    }

    impl Serialize for Strict {
        fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
            self.0.serialize(serializer)
        }
    }

    impl<'de> Deserialize<'de> for Strict {
        fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
            struct Three;
            impl<'de> serde::de::Visitor<'de> for Three {
                type Value = Strict;
                fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                    f.write_str("three numbers")
                }
                fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Strict, A::Error> {
                    if let Some(len) = seq.size_hint().filter(|len| *len != 3) {
                        return Err(serde::de::Error::invalid_length(len, &self));
                    }
                    let mut next = || seq.next_element::<Wide>().map(|number| number.unwrap().0);
                    Ok(Strict([next()?, next()?, next()?]))
                }
            }
            deserializer.deserialize_tuple(3, Three)
        }
    }

    #[test]
    fn first_row_tells_its_length_and_the_width_of_its_numbers() {
        for len in [7, 8, 20] {
            let list: Vec<_> = (0..len).map(|n| Strict([n, u128::MAX - n, 0])).collect();
            assert_eq!(back(&list), list);
        }
    }

    #[test]
    fn structs_of_one_field_are_read_as_variants_also_in_rows() {
        #[derive(Serialize, Clone)]
        struct One {
            a: u32,
        }
        #[derive(Deserialize, PartialEq, Debug)]
        #[allow(non_camel_case_types)]
        enum Variant {
            a(u32),
        }
        for len in [1, 7, 8, 20] {
            let list: Vec<_> = (0..len).map(|a| One { a }).collect();
            let variants: Vec<Variant> = from_slice(&bytes_of(&list)).unwrap();
            assert_eq!(variants, (0..len).map(Variant::a).collect::<Vec<_>>());
        }
    }

    #[test]
    fn visitor_that_panics_in_a_row_and_is_caught_takes_nothing_of_what_follows() {
        struct Bomb;
        impl<'de> Deserialize<'de> for Bomb {
            fn deserialize<D: serde::Deserializer<'de>>(_: D) -> std::result::Result<Self, D::Error> {
                std::panic::resume_unwind(Box::new("it was to panic"))
            }
        }
        struct Caught;
        impl<'de> Deserialize<'de> for Caught {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
                let read = std::panic::AssertUnwindSafe(|| Vec::<(u32, Bomb, u32)>::deserialize(deserializer).is_ok());
                assert!(std::panic::catch_unwind(read).is_err());
                Ok(Self)
            }
        }
        let (Caught, after): (Caught, u32) = from_slice(&bytes_of(&(vec![(1_u32, 2_u32, 3_u32); 8], 77_u32))).unwrap();
        assert_eq!(after, 77);
    }

    fn zeros() -> [u64; 8192] {
        [0; 8192]
    }

    #[test]
    fn nested_values_of_64_kib_are_read_on_a_stack_of_2_mib() {
        #[derive(Serialize, Deserialize)]
        #[allow(clippy::large_enum_variant)]
        enum Large {
            End,
            Node {
                #[serde(skip, default = "zeros")]
                pad: [u64; 8192],
                probe: u32,
                next: Box<Large>,
            },
        }
        for nodes in [2, 9, 60] {
            let test = move || {
                let mut value = Box::new(Large::End);
                for probe in 0..nodes {
                    value = Box::new(Large::Node { pad: zeros(), probe, next: value });
                }
                let mut left: Box<Large> = from_slice(&bytes_of(&value)).unwrap();
                for wanted in (0..nodes).rev() {
                    let Large::Node { probe, next, pad } = *left else { panic!("it ends early") };
                    assert_eq!((probe, pad[0]), (wanted, 0));
                    left = next;
                }
            };
            std::thread::Builder::new().stack_size(2 << 20).spawn(test).unwrap().join().unwrap();
        }
    }

    #[derive(Serialize, Deserialize, PartialEq, Debug, Clone)]
    #[serde(rename = "$dollars")]
    struct Dollars(u8);

    #[test]
    fn newtypes_whose_name_begins_with_a_dollar_arrive() {
        same((Dollars(1), vec![Dollars(2); 12], vec![(Dollars(3), 1.5f32); 12], Some(Dollars(4))));
    }

    #[test]
    fn rows_with_damage_are_an_error() {
        let samples: Vec<_> = (0..20).map(sample).collect();
        let bytes = bytes_of(&samples);
        fn with(bytes: &[u8], at: usize) -> Vec<u8> {
            let mut bytes = bytes.to_vec();
            bytes[at] ^= 0x80;
            bytes
        }
        for at in 0..bytes.len() {
            // Numbers change; a bool that is none, a tag or a count does not pass.
            if let Ok(read) = from_slice::<Vec<Sample>>(&with(&bytes, at)) {
                assert_eq!(read.len(), samples.len());
            }
            assert!(from_slice::<Vec<Sample>>(&bytes[..at]).is_err());
        }
    }

    #[test]
    fn an_element_that_is_no_row_like_the_others_undoes_them() {
        let others = [Either::Named { x: 1, y: 2 }, Either::Text("text".to_string()), Either::Deep((((((7,),),),),))];
        for (at, other) in (0..12).flat_map(|at| others.iter().map(move |other| (at, other))) {
            let mut list = vec![Either::Pair(3, 4); 12];
            list[at] = other.clone();
            same(list);
        }
        for at in 0..12 {
            let mut list = vec![Sparse { first: None, second: 1, third: 0 }; 12];
            list[at] = Sparse { first: None, second: 0, third: 2 };
            same(list.clone());
            list[at].first = Some(3);
            same(list);
        }
    }

    #[test]
    fn a_type_that_is_an_option_of_itself_does_not_ask_for_ever() {
        #[derive(Deserialize, Debug)]
        struct Chain(#[allow(dead_code)] Option<Box<Chain>>);
        assert!(from_slice::<Chain>(&bytes_of(&7u8)).is_err());
        assert!(from_slice::<Vec<Chain>>(&bytes_of(&vec![true; 9])).is_err());
        assert!(from_slice::<Vec<Chain>>(&bytes_of(&vec![7u8; 9])).is_err());
        assert!(from_slice::<Vec<Chain>>(&bytes_of(&vec![[7u8; 2]; 9])).is_err());
        let numbers: Vec<Option<Option<bool>>> = from_slice(&bytes_of(&vec![true; 100])).unwrap();
        assert_eq!(numbers, [Some(Some(true)); 100]);
    }

    #[test]
    fn tuples_that_announce_another_length_are_counted() {
        struct Odd(usize, usize);
        impl Serialize for Odd {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
                use serde::ser::SerializeTuple;
                let mut elements = serializer.serialize_tuple(self.0)?;
                (0..self.1).try_for_each(|_| elements.serialize_element("x"))?;
                elements.end()
            }
        }
        for (said, are) in [(0, 3), (3, 0), (2, 3), (20, 3), (3, 300)] {
            assert_eq!(from_slice::<Vec<String>>(&bytes_of(&Odd(said, are))).unwrap().len(), are);
        }
    }

    #[test]
    fn a_visitor_of_another_list_gets_the_elements() {
        #[derive(Serialize, Deserialize, PartialEq, Debug)]
        struct Wrapped(f32);
        let floats: Vec<Wrapped> = from_slice(&bytes_of(&vec![1.5f32, 2.5])).unwrap();
        assert_eq!(floats, [Wrapped(1.5), Wrapped(2.5)]);
        assert_eq!(from_slice::<Vec<u64>>(&bytes_of(&vec![1u8, 2])).unwrap(), [1, 2]);
        assert_eq!(from_slice::<(u8, u8)>(&bytes_of(&vec![1u8, 2])).unwrap(), (1, 2));
        assert!(from_slice::<(u8, u8)>(&bytes_of(&vec![1u8, 2, 3])).is_err());
        assert_eq!(from_slice::<bytes::Bytes>(&bytes_of(&vec![1u8, 2])).unwrap()[..], [1, 2]);
        same((bytes::Bytes::from_static(b"text"), u128::MAX, i128::MIN, 'x', u64::MAX, f32::MIN_POSITIVE));
    }
}

mod depth {
    use super::*;
    use crate::wire::limits::{Deep, with_depth_limit};

    #[derive(Serialize, Deserialize, PartialEq, Debug)]
    struct List {
        next: Option<Box<List>>,
    }

    #[derive(Serialize, Deserialize, PartialEq, Debug)]
    #[serde(tag = "type")]
    enum Tagged {
        Leaf,
        Node { values: Vec<Tagged> },
    }

    #[derive(Serialize, Deserialize, PartialEq, Debug)]
    #[serde(untagged)]
    enum Untagged {
        Leaf(u8),
        Node([Box<Untagged>; 1]),
    }

    fn list(nodes: usize) -> List {
        (0..nodes).fold(List { next: None }, |next, _| List { next: Some(Box::new(next)) })
    }

    /// Drops it without recursion.
    fn length(mut list: List) -> usize {
        let mut length = 0;
        while let Some(next) = list.next {
            (list, length) = (*next, length + 1);
        }
        length
    }

    fn on_a_small_stack(test: fn()) {
        let thread = std::thread::Builder::new().stack_size(2 << 20).spawn(test);
        thread.unwrap().join().unwrap();
    }

    #[test]
    fn value_of_the_permitted_depth_arrives_on_a_small_stack() {
        on_a_small_stack(|| {
            let nested = (0..500).fold(Tagged::Leaf, |inner, _| Tagged::Node { values: vec![inner] });
            assert!(from_slice::<Tagged>(&bytes_of(&nested)).unwrap() == nested);
            let nested = (0..500).fold(Untagged::Leaf(1), |inner, _| Untagged::Node([Box::new(inner)]));
            assert!(from_slice::<Untagged>(&bytes_of(&nested)).unwrap() == nested);
            assert_eq!(length(back(&list(500))), 500);
            let json = (0..1000).fold(serde_json::Value::Null, |inner, _| serde_json::Value::Array(vec![inner]));
            assert!(back(&json) == json);
        });
    }

    #[derive(Serialize, Deserialize)]
    struct Square {
        data: [[u64; 32]; 32],
        next: Option<Box<Square>>,
    }

    #[allow(clippy::large_enum_variant, reason = "what is large on the stack is what is tested")]
    #[derive(Serialize, Deserialize)]
    #[serde(tag = "type")]
    enum TaggedWide {
        End,
        Node { data: [[u64; 32]; 16], next: Box<TaggedWide> },
    }

    /// As the receiver's thread would. The value is dropped elsewhere.
    fn read_on_a_small_stack<T: Serialize + DeserializeOwned + Send + 'static>(bytes: Vec<u8>) {
        let small = std::thread::Builder::new().stack_size(2 << 20);
        let thread = small.spawn(move || (from_slice::<T>(&bytes).map(Box::new), bytes)).unwrap();
        let (value, sent) = thread.join().unwrap();
        assert!(bytes_of(&value.unwrap()) == sent);
    }

    #[test]
    fn large_values_arrive_on_a_small_stack_however_deep() {
        // They are made, and sent, on a larger one.
        let large = std::thread::Builder::new().stack_size(64 << 20).spawn(|| {
            let last = || Square { data: [[7; 32]; 32], next: None };
            for nodes in [3, 7, 10, 100, 400] {
                let chain = (0..nodes).fold(last(), |next, _| Square { next: Some(Box::new(next)), ..last() });
                let bytes = bytes_of(&chain);
                read_on_a_small_stack::<Square>(bytes);
            }
            let nested = (0..200)
                .fold(TaggedWide::End, |next, _| TaggedWide::Node { data: [[7; 32]; 16], next: Box::new(next) });
            read_on_a_small_stack::<TaggedWide>(bytes_of(&nested));
        });
        large.unwrap().join().unwrap();
    }

    #[test]
    fn value_that_is_too_deep_is_refused_by_the_writer() {
        on_a_small_stack(|| {
            let (short, long) = (list(511), list(512));
            assert_eq!(length(back(&short)), 511);
            let error = append(&long, &mut Vec::new()).unwrap_err();
            assert!(error.to_string().contains("deeper than 1024 levels"), "{error}");
        });
    }

    #[test]
    fn the_limit_can_be_raised() {
        on_a_small_stack(|| {
            let long = list(30_000);
            let bytes = with_depth_limit(100_000, || bytes_of(&long));
            assert_eq!(length(from_slice(&bytes).unwrap()), 30_000);
            let long = Deep(long);
            assert_eq!(bytes, bytes_of(&long));
            assert_eq!(length(from_slice::<Deep<List>>(&bytes).unwrap().0), 30_000);
            assert!(append(&list(600), &mut Vec::new()).is_err());
            assert_eq!(length(long.0), 30_000);
        });
    }

    #[test]
    fn bytes_cannot_nest_deeper_than_they_announce() {
        on_a_small_stack(|| {
            let mut bytes = vec![tag::SOME; 1 << 20];
            bytes[0] = VERSION;
            bytes.push(tag::UNIT);
            assert!(from_slice::<serde_json::Value>(&bytes).is_err());
            assert!(from_slice::<List>(&bytes).is_err());
            bytes[0] |= IS_DEEP;
            for depth in [17, 1 << 15, 1 << 20, u32::MAX] {
                let bytes = [&bytes[..], &depth.to_le_bytes()].concat();
                assert!(from_slice::<serde_json::Value>(&bytes).is_err());
                assert!(from_slice::<List>(&bytes).is_err());
            }
        });
    }
}

mod damage {
    use super::fuzz::{Random, check, check_one, damaged, seeds};

    #[test]
    fn damaged_bytes_are_an_error_or_a_value() {
        let (seeds, mut random) = (seeds(), Random(0x5eed));
        seeds.iter().for_each(|seed| check(seed));
        for round in 0..100_000 {
            check_one(&damaged(&seeds, &mut random), round);
        }
    }

    #[test]
    fn a_message_that_ends_early_is_an_error() {
        for seed in seeds() {
            (0..seed.len()).for_each(|end| check(&seed[..end]));
        }
    }

    #[test]
    fn more_elements_than_bytes_are_an_error_at_once() {
        use super::*;
        let with_count = |head: &[u8], count: u64| [&[VERSION], head, &count.to_le_bytes()].concat();
        for count in [1, 1 << 31, 1 << 60, u64::MAX] {
            assert!(from_slice::<Vec<()>>(&with_count(&[tag::SEQ], count)).is_err());
            assert!(from_slice::<Vec<[u8; 0]>>(&with_count(&[tag::SEQ], count)).is_err());
            assert!(from_slice::<BTreeMap<u8, u8>>(&with_count(&[tag::MAP], count)).is_err());
            assert!(from_slice::<String>(&with_count(&[tag::STR, 255], count)).is_err());
            for width in [0, 3, 255] {
                assert!(from_slice::<Vec<f64>>(&with_count(&[tag::RUN, tag::F64, width], count)).is_err());
                assert!(from_slice::<Vec<[f64; 3]>>(&with_count(&[tag::RUN, tag::F64, width], count)).is_err());
            }
        }
    }
}

mod borrowing {
    use super::*;

    #[derive(Serialize, Deserialize, PartialEq, Debug)]
    struct Borrowed<'a> {
        text: &'a str,
        bytes: &'a [u8],
    }

    #[test]
    fn texts_and_bytes_may_stay_in_the_message() {
        let bytes = bytes_of(&Borrowed { text: "text", bytes: b"bytes" });
        let read: Borrowed<'_> = from_slice(&bytes).unwrap();
        assert_eq!(read, Borrowed { text: "text", bytes: b"bytes" });
        assert!(bytes.as_ptr_range().contains(&read.text.as_ptr()));
    }
}

/// Large parts by themselves.
mod in_parts {
    use super::*;
    use crate::wire::format::parts::MOST;

    #[derive(Serialize, Deserialize, PartialEq, Debug, Clone)]
    struct Large {
        name: String,
        numbers: Vec<f64>,
        points: Vec<[f32; 3]>,
        places: Vec<usize>,
        bytes: bytes::Bytes,
        other: BTreeMap<String, Vec<u16>>,
        set: BTreeSet<u32>,
        end: u8,
    }

    fn large() -> Large {
        Large {
            name: "a name that is long enough ".repeat(10),
            numbers: vec![1.5; 9],
            points: vec![[1.0, 2.0, 3.0]; 5],
            places: vec![1, usize::MAX, 3],
            bytes: vec![7; 300].into(),
            other: [("a key".into(), vec![1, 2, 3, 4, 5]), ("short".into(), vec![])].into(),
            set: (0..4).collect(),
            end: 9,
        }
    }

    fn parted(bytes: &[u8]) -> Parted {
        Parted::receive(&bytes)
    }

    #[test]
    fn each_large_part_comes_by_itself_and_the_value_is_the_same() {
        let bytes = bytes_of(&large());
        let mut message = parted(&bytes);
        assert_eq!(message.apart.len(), 6, "{message:?}");
        let at = message.apart[1].list.bytes().as_ptr();
        let arrived: Large = from_parted(&mut message).unwrap();
        assert_eq!((&arrived, arrived.numbers.as_ptr().cast()), (&large(), at));
        same(large());
        same(vec![large(); 3]);
        // Too many for a list.
        same(vec![large(); MOST]);
    }

    #[test]
    fn parts_are_read_as_other_types_too() {
        let bytes = bytes_of(&(vec![1u16; 8], vec![2u8; 9], "a text of some length ".repeat(12), [3i64; 2]));
        let read = || parted(&bytes);
        type Other<'a> = (VecDeque<u16>, bytes::Bytes, Box<str>, Vec<i128>);
        let other: Other<'_> = from_parted(&mut read()).unwrap();
        assert_eq!(other, ([1; 8].into(), vec![2; 9].into(), "a text of some length ".repeat(12).into(), vec![3; 2]));
        let any: serde_json::Value = from_parted(&mut read()).unwrap();
        assert_eq!(any, from_slice::<serde_json::Value>(&bytes).unwrap());
        from_parted::<serde::de::IgnoredAny>(&mut read()).unwrap();
        assert!(from_parted::<(Vec<u8>, Vec<u8>, u8, u8)>(&mut read()).is_err());
    }

    #[test]
    fn parts_within_what_moves_are_not_listed() {
        struct Wrong;
        impl Serialize for Wrong {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                use serde::ser::SerializeTuple;
                // It says that there is one element, and writes two.
                let mut tuple = serializer.serialize_tuple(1)?;
                tuple.serialize_element(&vec![1u32; 8])?;
                tuple.serialize_element(&vec![2u32; 8])?;
                tuple.end()
            }
        }
        let bytes = bytes_of(&(vec![0u32; 8], Wrong, vec![3u32; 8]));
        let arrived: (Vec<u32>, Vec<Vec<u32>>, Vec<u32>) = from_parted(&mut parted(&bytes)).unwrap();
        assert_eq!(arrived, (vec![0; 8], vec![vec![1; 8], vec![2; 8]], vec![3; 8]));
        assert_eq!(parted(&bytes).apart.len(), 2);
    }

    #[test]
    fn list_of_parts_that_cannot_be_leaves_the_message_in_one_piece() {
        let bytes = bytes_of(&(vec![1u32; 8], vec![2u32; 8]));
        let list = bytes.len() - 2 * 17 - 1;
        for (at, byte) in [(list, 0), (list, 255), (list + 8, 0), (list + 8, 255), (list + 16, 3), (list + 24, 16)] {
            let mut bytes = bytes.clone();
            bytes[at] = byte;
            let mut message = parted(&bytes);
            assert!(message.apart.is_empty(), "{at}: {message:?}");
            assert_eq!(from_parted::<(Vec<u32>, Vec<u32>)>(&mut message).unwrap(), (vec![1; 8], vec![2; 8]));
        }
        for count in [0, 1, 3, 200] {
            let mut bytes = bytes.clone();
            *bytes.last_mut().unwrap() = count;
            assert!(from_parted::<(Vec<u32>, Vec<u32>)>(&mut parted(&bytes)).is_err(), "{count}");
        }
        // Where nothing large is.
        let mut moved = bytes.clone();
        moved[list] -= 1;
        assert!(from_parted::<(Vec<u32>, Vec<u32>)>(&mut parted(&moved)).is_err());
    }
}
