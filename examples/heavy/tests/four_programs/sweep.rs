use super::{Program, temporary};
use crate::programs::{until, with_kills};
use rustix::process::{Pid, Signal, kill_process_group};

fn proportional_memory(pid: Pid) -> u64 {
    let rollup = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", pid.as_raw_pid())).unwrap_or_default();
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
}

#[test]
fn eight_workers_share_a_model_of_200_mb_and_the_curve_is_whole_though_one_is_killed() {
    let path = temporary("sweep.svg");
    let output = with_kills(|| {
        let mut program = Program::start("sweep", [path.to_str().unwrap()]);
        let group = Pid::from_child(program.child());
        let all = until("it has eight workers, or has ended", || {
            let is_over = program.child().try_wait().unwrap().is_some();
            (is_over || program.workers().len() == 8).then_some(!is_over)
        });
        // They hold still while they are measured.
        let is_killed = all && kill_process_group(group, Signal::STOP).is_ok() && {
            let memory: Vec<_> = program.workers().into_iter().map(proportional_memory).collect();
            let is_killed = program.kill_a_worker(3);
            kill_process_group(group, Signal::CONT).unwrap();
            // All have the model, and none for itself.
            assert!(memory.iter().all(|kib| (10 << 10..40 << 10).contains(kib)), "{memory:?} KiB");
            is_killed
        };
        let output = program.finish();
        is_killed.then_some(output)
    });
    let lines: Vec<_> = output.lines().collect();
    let best = lines[0].strip_prefix("41 points, the best at ").and_then(|rest| rest.split_once(' ')?.0.parse().ok());
    // Three of four words follow as the table has it; the others, by their frequency.
    assert!(best.is_some_and(|best: f64| (0.6..0.95).contains(&best)), "{output}");
    let most = lines[1].strip_prefix("8 workers, each of ").and_then(|rest| rest.split_once(" MiB")?.0.parse().ok());
    assert!(most.is_some_and(|mib: u64| (10..40).contains(&mib)), "{output}");

    let svg = std::fs::read_to_string(&path).unwrap();
    let curves = svg.split("<polyline").filter(|curve| curve.contains("#FF0000"));
    let points: Vec<_> = curves.filter_map(|curve| curve.split("points=\"").nth(1)?.split('"').next()).collect();
    assert_eq!(points.len(), 1, "one curve");
    assert_eq!(points[0].split_whitespace().count(), 41);
    std::fs::remove_file(&path).unwrap();
}
