//! Which requests are answered: those that read, and that a browser sends to us by a name that is ours.
//!
//! A page of some other site can have a browser send requests to this machine. It can read the answers only if its own name leads here
//! (DNS rebinding); the request then has that name in its `Host`. So a name that is not ours is refused.

use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::http::uri::Authority;
use hyper::{Method, Request, StatusCode};
use std::net::IpAddr;

/// Why a request is not answered, for whoever sent it.
pub(super) type Refusal = (StatusCode, &'static str);

const METHOD: Refusal = (StatusCode::METHOD_NOT_ALLOWED, "This page can only be read: GET and HEAD are answered.\n");
const NO_HOST: Refusal = (StatusCode::BAD_REQUEST, "The request has no Host header, or not exactly one name in it.\n");
const HOST: Refusal = (
    StatusCode::FORBIDDEN,
    "The Host header is not the address of this page. If this name is to lead here, add it by Dashboard::host \
     [dashboard-foreign-host]\n",
);

/// A host in the form in which it is compared: an address as a number, a name in small letters and without the dot of the root.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Host {
    Ip(IpAddr),
    Name(String),
}

impl Host {
    /// An address of IPv6 may have brackets. `None` for a text that is neither a name nor an address, such as a name with a port.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let text = text.strip_suffix('.').unwrap_or(text);
        let bracketed = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
        if let Ok(ip) = bracketed.unwrap_or(text).parse::<IpAddr>() {
            return (ip.is_ipv6() || bracketed.is_none()).then(|| Self::Ip(ip.to_canonical()));
        }
        let is_label = |label: &str| {
            !label.is_empty() && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
        };
        text.split('.').all(is_label).then(|| Self::Name(text.to_ascii_lowercase()))
    }
}

/// `ours` is the address at which the request arrived, `names` are further names of it.
pub(super) fn check<B>(request: &Request<B>, ours: IpAddr, names: &[Host]) -> Result<(), Refusal> {
    if request.method() != Method::GET && request.method() != Method::HEAD {
        return Err(METHOD);
    }
    let host = host_of(request.headers()).ok_or(NO_HOST)?;
    // A request to a proxy names its target twice.
    let also = request.uri().authority();
    let are_ours = [Some(&host), also].into_iter().flatten().all(|authority| is_ours(authority, ours, names));
    if are_ours { Ok(()) } else { Err(HOST) }
}

/// `None` unless there is exactly one, with a name and perhaps a port.
fn host_of(headers: &HeaderMap<HeaderValue>) -> Option<Authority> {
    let mut all = headers.get_all(header::HOST).iter();
    let (host, None) = (all.next()?, all.next()) else { return None };
    let host = host.to_str().ok()?;
    let authority: Authority = host.parse().ok()?;
    (!host.contains('@') && !authority.host().is_empty()).then_some(authority)
}

/// The port is not looked at: it is another one behind a tunnel.
fn is_ours(authority: &Authority, ours: IpAddr, names: &[Host]) -> bool {
    let ours = ours.to_canonical();
    let Some(host) = Host::parse(authority.host()) else { return false };
    let is_here = match &host {
        Host::Ip(ip) => *ip == ours || ip.is_loopback() && ours.is_loopback(),
        Host::Name(name) => name == "localhost",
    };
    is_here || names.contains(&host)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(method: &str, uri: &str, hosts: &[&str]) -> u16 {
        let mut request = Request::builder().method(method).uri(uri);
        for host in hosts {
            request = request.header("host", *host);
        }
        let names = [Host::parse("status.example.com").unwrap()];
        let checked = check(&request.body(()).unwrap(), [127, 0, 0, 1].into(), &names);
        checked.map_or_else(|(status, _)| status.as_u16(), |()| 200)
    }

    #[test]
    fn only_our_own_names_are_hosts() {
        for host in ["127.0.0.1", "127.0.0.1:80", "localhost:1", "LOCALHOST", "[::1]:80", "status.example.com:443"] {
            assert_eq!(answer("GET", "/", &[host]), 200, "{host}");
        }
        let foreign = [
            "evil.example",
            "evil.example:80",
            "10.0.0.1",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "[::2]",
            "notstatus.example.com",
        ];
        for host in foreign {
            assert_eq!(answer("GET", "/", &[host]), 403, "{host}");
        }
        let none: [&[&str]; 5] = [&[], &[""], &["a b"], &["localhost", "localhost"], &["user@localhost"]];
        for hosts in none {
            assert_eq!(answer("GET", "/", hosts), 400, "{hosts:?}");
        }
        assert_eq!(answer("GET", "http://evil.example/", &["localhost"]), 403);
        assert_eq!(answer("GET", "http://localhost/", &["localhost"]), 200);
    }

    #[test]
    fn a_further_name_is_known_in_each_form_of_it() {
        let forms = [
            ("[2001:DB8::A]", "[2001:db8:0:0::a]"),
            ("2001:db8::a", "[2001:DB8::A]:443"),
            ("[2001:db8::a].", "[2001:db8::a]:1"),
            ("::ffff:192.0.2.7", "192.0.2.7:80"),
            ("192.0.2.7", "[::FFFF:192.0.2.7]"),
            ("192.0.2.7.", "192.0.2.7"),
            ("Status.Example.COM.", "status.example.com"),
            ("status.example.com", "STATUS.example.com.:8080"),
        ];
        for (added, asked) in forms {
            let names = [Host::parse(added).unwrap()];
            let checked = |host: &str| {
                let request = Request::builder().uri("/").header("host", host).body(()).unwrap();
                check(&request, [127, 0, 0, 1].into(), &names).is_ok()
            };
            assert!(checked(asked), "{added}, asked for as {asked}");
            let foreign = [
                "[2001:db8::b]",
                "192.0.2.8",
                "status.example.com.evil.example",
                "a.status.example.com",
                "evil.example",
            ];
            for host in foreign {
                assert!(!checked(host), "{added}, asked for as {host}");
            }
        }
    }

    #[test]
    fn what_is_no_host_is_no_further_name() {
        let wrong = [
            "",
            ".",
            "..",
            "a..b",
            "a.b..",
            "a:80",
            "[::1]:80",
            "http://a",
            "a/b",
            "a b",
            "*",
            "u@a",
            "[127.0.0.1]",
            "[a]",
            "[::1",
            "::1]",
            "\u{e4}.de",
        ];
        for name in wrong {
            assert_eq!(Host::parse(name), None, "{name}");
        }
    }

    #[test]
    fn only_reading_is_allowed() {
        assert_eq!(answer("HEAD", "/", &["localhost"]), 200);
        for method in ["POST", "PUT", "DELETE", "OPTIONS", "CONNECT", "TRACE", "BREW"] {
            assert_eq!(answer(method, "/", &["localhost"]), 405, "{method}");
        }
    }
}
