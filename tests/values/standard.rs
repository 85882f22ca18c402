//! Primitives, the types of std, and options whose content looks like nothing.

use super::{Ways, equal};
use std::borrow::Cow;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap, HashSet, LinkedList, VecDeque};
use std::ffi::{CString, OsString};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::num::{NonZeroI64, NonZeroU8, NonZeroU128, Saturating, Wrapping};
use std::ops::Bound;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

pub(super) fn send(ways: &mut Ways) {
    primitives(ways);
    texts_and_bytes(ways);
    lists(ways);
    maps(ways);
    options(ways);
    others(ways);
}

fn primitives(ways: &mut Ways) {
    equal! { ways:
        true; false; ();
        u8::MAX; u16::MAX; u32::MAX; u64::MAX; u128::MAX; usize::MAX; 0_u8; 0_u64;
        i8::MIN; i16::MIN; i32::MIN; i64::MIN; i128::MIN; isize::MIN; -1_i32; -1_i128;
        f32::MIN_POSITIVE; f32::INFINITY; f64::MAX; f64::NEG_INFINITY; f64::EPSILON; 0.1_f64;
        'a'; '\0'; char::MAX; '\u{1F980}';
        (1_u8,); (1_u8, -2_i16); (1_u8, 2.5_f32, 'c', true); ((), ());
        (1_u8, 2_u8, 3_u8, 4_u8, 5_u8, 6_u8, 7_u8, 8_u8, 9_u8, 10_u8, 11_u8, 12_u8);
        ((1_u8, (2_u16, (3_u32, (4_u64,)))), [(5_u8, 'x')]);
    }
    for bits in [f64::NAN.to_bits(), (-0.0_f64).to_bits(), 0x7ff0_0000_0000_0001] {
        ways.alike("f64 by its bits", f64::from_bits(bits), |value| format!("{:x}", value.to_bits()));
        ways.alike("f64 by its bits, in a list", vec![f64::from_bits(bits)], |value| {
            format!("{:x}", value[0].to_bits())
        });
    }
    ways.alike("f32 NaN", (f32::NAN, 1_u8), |value| format!("{:x}", value.0.to_bits()));
}

fn texts_and_bytes(ways: &mut Ways) {
    equal! { ways:
        String::new(); String::from("text"); "\u{0}\u{7f}ß€🦀".to_string(); "x".repeat(70_000); vec![String::new(); 3];
        vec![0_u8; 0]; (0..=255).collect::<Vec<u8>>(); vec![7_u8; 100_000]; vec![vec![1_u8], vec![]];
        Box::<str>::from("boxed"); Box::<[u8]>::from([1, 2]); Box::<[String]>::from([String::from("a")]);
        Arc::<str>::from("shared"); Arc::<[u16]>::from([1, 2]); Arc::new(vec![1_u8]);
        Cow::<'static, str>::from("cow"); Cow::<'static, [u8]>::from(vec![1, 2]);
        PathBuf::from("/a/b c"); OsString::from("os"); CString::new("c").unwrap();
        [0_u8; 0]; [1_u8; 32]; [[1_u8; 2]; 3]; [String::from("a"), String::from("b")];
    }
}

fn lists(ways: &mut Ways) {
    equal! { ways:
        Vec::<()>::new(); vec![(); 5]; vec![true, false]; vec!['a', 'b']; vec![i8::MIN, 0, i8::MAX];
        vec![u16::MAX]; vec![u32::MAX, 1]; vec![i64::MIN, 3]; vec![u128::MAX]; vec![usize::MAX]; vec![1.5_f32]; vec![0.1_f64; 9];
        vec![[1.0_f32, 2.0, 3.0]; 4]; vec![[u64::MAX; 2]; 3]; vec![[1_i16; 4]; 2]; vec![[1_u8; 5]; 2]; [[[1_i32; 2]; 2]; 2];
        vec![(1_u32, 0.5_f32), (2, -1.0)]; vec![(1_u8, String::from("a"))]; vec![vec![vec![1_i32], vec![]], vec![]];
        VecDeque::from([1_u32, 2, 3]); VecDeque::from([String::from("x")]); LinkedList::from([1.5_f64]);
        BTreeSet::from([3_i32, 1, 2]); HashSet::from([String::from("a"), String::from("b")]); HashSet::from([(1_u8, 2_u8)]);
        (1_u8, vec![1_u16, 2], vec![0.5_f64]); vec![Some(1_u8), None]; vec![Ok::<u8, String>(1), Err("no".into())];
    }
    let heap = BinaryHeap::from([3_u8, 1, 2]);
    ways.alike("BinaryHeap", heap, |heap| format!("{:?}", heap.clone().into_sorted_vec()));
}

fn maps(ways: &mut Ways) {
    equal! { ways:
        BTreeMap::<String, u8>::new(); HashMap::from([(1_u64, 0.5_f64), (2, 1.5)]);
        BTreeMap::from([("a".to_string(), vec![1_u8]), ("b".to_string(), vec![])]);
        BTreeMap::from([(1_u8, BTreeMap::from([(true, 'x')]))]); BTreeMap::from([((1_u8, 2_u8), "pair".to_string())]);
        BTreeMap::from([(vec![1_u8, 2], 1_u8)]); BTreeMap::from([(None, 1_u8), (Some(0_u8), 2)]);
        BTreeMap::from([(Some(()), 1_u8), (None, 2)]); BTreeMap::from([(None, 1_u8), (Some(None), 2), (Some(Some(1_u8)), 3)]);
        BTreeMap::from([((), ())]); BTreeMap::from([('c', 1_u8)]); BTreeMap::from([(i128::MIN, i128::MAX)]);
        BTreeMap::from([(Ipv4Addr::LOCALHOST, 1_u8)]); BTreeMap::from([(Reverse(1_u8), 1_u8)]);
        BTreeMap::from([(true, Some(None::<u8>)), (false, None)]);
        HashMap::from([(Ok::<u8, u8>(1), "ok".to_string()), (Err(1), "err".to_string())]);
    }
}

fn options(ways: &mut Ways) {
    equal! { ways:
        None::<u8>; Some(0_u8); Some(()); None::<()>; Some(None::<u8>); Some(Some(1_u8)); Some(Some(None::<()>)); Some(Some(Some(())));
        Box::new(Some(())); Box::new(Some(None::<u8>)); Some(Box::new(())); Arc::new(Some(())); Some(Arc::new(None::<u8>));
        vec![Some(()), None]; vec![None::<()>; 2]; (Some(()), None::<()>); [Some(None::<u8>), None, Some(Some(1))];
        Some(serde_json::Value::Null); None::<serde_json::Value>; Some(Some(serde_json::Value::Null));
        Wrapping(7_u8); Some(Wrapping(1_i32)); Ok::<(), ()>(()); Err::<Option<()>, Option<()>>(Some(())); Ok::<Option<()>, u8>(None);
        Some(vec![Some(())]); Some(String::new()); Some(Vec::<u8>::new()); Some(false);
        BTreeMap::from([(1_u8, Some(())), (2, None)]); HashMap::from([(1_u8, Some(None::<u8>)), (2, None)]);
    }
}

fn others(ways: &mut Ways) {
    equal! { ways:
        0..5_u8; 0..=5_u8; 1.0..2.0_f64; 5_u8..; ..5_u8; Bound::Included(1_u8); Bound::<u8>::Unbounded; (Bound::Excluded(1_u8), Bound::Included(2));
        NonZeroU8::MAX; NonZeroI64::MIN; NonZeroU128::MAX; Some(NonZeroU8::MIN); Saturating(3_u16); Reverse(2_i32);
        Duration::from_nanos(1_500_000_001); Duration::MAX; SystemTime::UNIX_EPOCH + Duration::from_nanos(1);
        IpAddr::V4(Ipv4Addr::BROADCAST); IpAddr::V6(Ipv6Addr::LOCALHOST); Ipv6Addr::from(0xfe80_u128 << 112 | 1);
        SocketAddr::from(([127, 0, 0, 1], 80)); SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0);
        SocketAddrV6::new(Ipv6Addr::LOCALHOST, 443, 0, 7); SocketAddr::V6(SocketAddrV6::new(Ipv6Addr::LOCALHOST, 443, 0, 7));
        std::marker::PhantomData::<String>; Err::<u8, String>("why".into()); Ok::<Vec<u8>, ()>(vec![1]);
        vec![Duration::from_millis(1); 3]; (SystemTime::UNIX_EPOCH, PathBuf::from("p")); Some(IpAddr::V4(Ipv4Addr::LOCALHOST));
    }
}
