//! The kernels read no byte beyond a row: weights, activations and norms lie directly before an untouchable page, and
//! the results are those of ordinary memory.

use kestrel_formats::{GgmlType, WeightType};
use kestrel_runtime::kernels::{ActKind, Acts, Compute, Isa, MatrixRef, Then};
use kestrel_tests::guard::Guarded;

/// Weights and numbers that repeat; what they are does not matter here, but NaN would hide differences.
fn numbers(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919) % 1013) as f32 / 506.5 - 1.0).collect()
}

fn product(isa: Isa, matrix: &MatrixRef, x: &[f32], norm: &[f32], tokens: usize, precise: bool) -> Vec<u32> {
    let WeightType::Ggml(ty) = matrix.dtype else { panic!("a type of GGUF") };
    let kind = ActKind::for_weights(ty, precise);
    let mut compute = Compute::new(isa, 1, tokens);
    let mut acts = Acts::with_capacity(tokens, matrix.cols);
    compute.norm(x, norm, 1e-5, kind, &mut acts);
    let mut out = vec![0.0; tokens * matrix.rows];
    compute.matmul(matrix, &acts, &mut out, Then::Store);
    out.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn products_stay_within_their_rows() {
    for ty in GgmlType::all() {
        let blocks = |n: usize| n.next_multiple_of(ty.block_len());
        for (rows, cols) in [(1, blocks(1)), (3, blocks(33)), (17, blocks(300)), (33, blocks(520))] {
            let mut bytes = vec![0; ty.bytes_for((rows * cols) as u64).expect("whole blocks") as usize];
            kestrel_quant::codec(ty).quantize(&numbers(rows * cols), None, &mut bytes);
            let guarded = Guarded::new(&bytes);
            let plain = MatrixRef::new(ty, rows, cols, &bytes).expect("a matrix");
            let at_the_edge = MatrixRef::new(ty, rows, cols, &guarded).expect("a matrix");
            for tokens in [1, 3, 4, 9, 35] {
                let (x, norm) = (numbers(tokens * cols), numbers(cols));
                let (guarded_x, guarded_norm) = (Guarded::new(&x), Guarded::new(&norm));
                for precise in [false, true] {
                    for isa in Isa::all_supported() {
                        let want = product(isa, &plain, &x, &norm, tokens, precise);
                        let got = product(isa, &at_the_edge, &guarded_x, &guarded_norm, tokens, precise);
                        assert_eq!(got, want, "{} {ty} {rows}x{cols}, {tokens} tokens", isa.name());
                    }
                }
            }
            let mut out = vec![0.0; cols];
            kestrel_quant::codec(ty).dequantize(&guarded[..bytes.len() / rows], &mut out);
        }
    }
}

/// Reads one byte too many if it is told to, in a process of its own.
#[test]
fn the_guard_ends_a_process_that_reads_too_far() {
    const TOLD: &str = "KESTREL_READ_TOO_FAR";
    let guarded = Guarded::new(&[1u8; 100]);
    if std::env::var_os(TOLD).is_some() {
        // SAFETY: none, that is the point: this process ends here.
        let beyond = unsafe { guarded.as_ptr().add(guarded.len()).read_volatile() };
        panic!("read {beyond}");
    }
    let status = std::process::Command::new(std::env::current_exe().expect("this test"))
        .args(["the_guard_ends", "--nocapture"])
        .env(TOLD, "1")
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .status()
        .expect("this test runs");
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(11), "{status}");
}
