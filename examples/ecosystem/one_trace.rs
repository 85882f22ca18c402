//! One trace, from a request through a worker process to the workers of its nested pool, as OpenTelemetry has it.
//!
//! Only the program itself has an exporter: `tracing-opentelemetry`, here with one that keeps its spans in memory. What the workers record by
//! `tracing` crosses to the process that called them, worker by worker, and is repeated there under the span of the call. So no process but this one needs a
//! subscriber, and no trace context is passed by hand.
//!
//! `cargo run -p multiprocess-ecosystem --example one_trace` prints each exported span: its trace, itself, its parent, the process that it is from, its name.

use multiprocess::{self as mp, Pool};
use opentelemetry::trace::TracerProvider;
use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider, SpanData};
use std::time::Duration;
use tracing::Instrument;
use tracing_subscriber::layer::SubscriberExt;

/// Runs in a worker of the worker.
fn chapter(number: u64) -> u64 {
    let _entered = tracing::info_span!("chapter", number).entered();
    tracing::info!("typeset");
    number * 10
}

/// Runs in a worker.
async fn report(chapters: u64) -> mp::Result<u64> {
    let nested = async {
        let pool = Pool::new(2)?;
        let pages = pool.map(chapter, 1..=chapters).await?;
        Ok(pages.into_iter().sum())
    };
    nested.instrument(tracing::info_span!("report", chapters)).await
}

async fn request(pool: &Pool) -> mp::Result<u64> {
    pool.apply(report, (2,)).await?
}

/// The process that a span is from: that of a task has it as a field.
fn process_of(span: &SpanData) -> String {
    let field = span.attributes.iter().find(|field| field.key.as_str() == "worker.pid");
    field.map_or_else(|| std::process::id().to_string(), |field| field.value.to_string())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    mp::run(async {
        // After `run` has begun: what stands before it runs in each worker too, and a worker with a subscriber of its own forwards nothing.
        let exporter = InMemorySpanExporter::default();
        let provider = SdkTracerProvider::builder().with_simple_exporter(exporter.clone()).build();
        let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("reports"));
        tracing::subscriber::set_global_default(tracing_subscriber::registry().with(layer))?;

        let pool = Pool::new(1)?;
        let pages = request(&pool).instrument(tracing::info_span!("request", path = "/reports/2")).await?;
        println!("{pages} pages");

        // The pool lets go of the caller's span a moment after it has handed over the result, and a span is exported when nobody holds it.
        let all_ended = async {
            while exporter.get_finished_spans().is_ok_and(|spans| spans.len() < 4) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), all_ended).await?;
        for span in exporter.get_finished_spans()? {
            let (trace, id, parent) = (span.span_context.trace_id(), span.span_context.span_id(), span.parent_span_id);
            println!("{trace} {id} {parent} {} {} events={}", process_of(&span), span.name, span.events.len());
        }
        Ok(())
    })
}
