//! The readable reference model against transformers in float32.

use kestrel_tests::goldens::{self, Golden};
use kestrel_tests::reference::Reference;

/// The stored form of the goldens is off by up to 1.6e-5, float32 itself by a few 1e-6.
const TOLERANCE: f64 = 3e-5;

fn flat(logits: Vec<Vec<f64>>) -> Vec<f64> {
    logits.into_iter().flatten().collect()
}

#[test]
fn equals_transformers_on_random_models() {
    let names = goldens::random_names();
    assert_eq!(names.len(), 6);
    for name in names {
        let golden = Golden::load(&name);
        let got = golden.compare(&flat(golden.model().reference().logits(&golden.tokens)));
        got.expect_within(TOLERANCE, &name);
    }
}

#[test]
fn another_eps_on_dt_b_and_c_fails_the_tolerance_of_the_runtime() {
    for name in ["falcon-1-layer", "falcon-2-layers", "falcon-4-layers"] {
        let golden = Golden::load(name);
        let mut model: Reference = golden.model().reference();
        model.h.mixer_rms_eps = 1e-5;
        let got = golden.compare(&flat(model.logits(&golden.tokens)));
        assert!(got.worst > 10.0 * crate::forward::TOLERANCE, "{name}: off by only {:.1e}", got.worst);
    }
}

#[test]
fn the_eps_scale_on_x_proj_is_exact() {
    for name in ["falcon-1-layer", "falcon-4-layers"] {
        let golden = Golden::load(name);
        let mut model = golden.model().reference();
        let scale = model.h.x_proj_scale();
        for layer in 0..model.h.n_layer {
            let (_, weights) = model.tensors.get_mut(&format!("blk.{layer}.ssm_x.weight")).expect("ssm_x");
            weights.iter_mut().for_each(|w| *w *= scale);
        }
        model.h.mixer_rms_eps = model.h.layer_norm_epsilon;
        golden.compare(&flat(model.logits(&golden.tokens))).expect_within(TOLERANCE, name);
    }
}

#[test]
fn random_checkpoints_are_the_bytes_that_python_wrote() {
    for name in goldens::random_names() {
        let golden = Golden::load(&name);
        assert_eq!(sha256_hex(&golden.model().safetensors()), golden.sha256(), "{name}");
    }
}

fn sha256_hex(bytes: &[u8]) -> String {
    use sha2::Digest;
    sha2::Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}
