//! A blackboard: objects in a process of their own, that others read, change and wait for. What an object of `Manager` is, and one of each kind.
//!
//! Objects of a manager can be reached from other machines, and outlive the processes that made them; locks and queues of the crate itself are faster. The
//! guide says which to take.
//!
//! `cargo run --example blackboard`

use multiprocess::{
    self as mp, ArrayProxy, BarrierProxy, ConditionProxy, EventProxy, Group, ListProxy, LockProxy, Manager, Namespace,
    QueueProxy, SemaphoreProxy, Ticket, ValueProxy,
};
use serde::{Deserialize, Serialize};

/// What each pupil gets. A proxy is a value, and stands for its object.
#[derive(Clone, Serialize, Deserialize)]
struct Lesson {
    board: Namespace,
    all_here: BarrierProxy,
    bell: EventProxy,
    chalk: SemaphoreProxy,
    line: LockProxy,
    answers: ListProxy<String>,
    questions: QueueProxy<u64>,
    asked: ConditionProxy,
    marks: ArrayProxy<u64>,
    sum: ValueProxy<u64>,
}

async fn pupil(number: usize, lesson: Lesson) -> mp::Result<()> {
    lesson.all_here.wait().await?;
    let question = lesson.questions.get().await?;
    let factor = lesson.board.get::<u64>("factor").await?.expect("it is on the board");
    {
        let _chalk = lesson.chalk.acquire().await?;
        // Two lines that belong together, whoever else writes.
        let _line = lesson.line.acquire().await?;
        lesson.answers.push(format!("{question} * {factor}")).await?;
        lesson.answers.push(format!("= {}", question * factor)).await?;
    }
    lesson.marks.set(number, question * factor).await?;
    lesson.sum.fetch_add(question * factor).await?;
    let guard = lesson.asked.lock().await?;
    lesson.asked.notify_all().await?;
    drop(guard);
    lesson.bell.wait().await
}

fn main() -> mp::Result<()> {
    mp::run(async {
        let manager = Manager::start().await?;
        let lesson = Lesson {
            board: manager.namespace().await?,
            all_here: manager.barrier(4).await?,
            bell: manager.event().await?,
            chalk: manager.semaphore(2).await?,
            line: manager.lock().await?,
            answers: manager.list().await?,
            questions: manager.queue(10).await?,
            asked: manager.condition().await?,
            marks: manager.array(vec![0; 3]).await?,
            sum: manager.value(0).await?,
        };
        // A namespace has a value of any type under each name.
        lesson.board.set("factor", 7_u64).await?;
        lesson.board.set("subject", "times tables".to_owned()).await?;

        let mut pupils = Group::new();
        for number in 0..3 {
            pupils.spawn(pupil, (number, lesson.clone()))?;
        }
        lesson.all_here.wait().await?;
        for question in [2, 3, 4] {
            lesson.questions.put(question).await?;
        }
        let mut guard = lesson.asked.lock().await?;
        while lesson.sum.get().await? < 7 * (2 + 3 + 4) {
            guard = lesson.asked.wait(guard).await?;
        }
        drop(guard);
        lesson.bell.set().await?;
        for ended in pupils.join_all().await {
            ended??;
        }

        // Many small calls go there and back as one message.
        let mut batch = lesson.answers.proxy().batch();
        let lines: Ticket<usize> = batch.call(lesson.answers.proxy(), |lines: &mut Vec<String>| lines.len(), ())?;
        let whole = batch.call(
            lesson.answers.proxy(),
            |lines: &mut Vec<String>| lines.chunks(2).all(|two| two[0].contains('*') && two[1].starts_with('=')),
            (),
        )?;
        let mut replies = batch.send().await?;
        println!(
            "{:?}: {} lines, each answer whole: {}",
            lesson.board.names().await?,
            replies.take(lines)?,
            replies.take(whole)?
        );
        println!("the sum is {}, of {} marks", lesson.sum.get().await?, lesson.marks.len().await?);
        manager.shutdown().await
    })
}
