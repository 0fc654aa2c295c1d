//! Calibration files: what the inputs of every matrix of a model are like, and what each type does to its predictions.
//! `kestrel calibrate` writes them, `--calibration` reads them.
//!
//! A GGUF file with `general.type` = `calibration`. For each matrix `NAME` (its GGUF name), all F32:
//!
//! | tensor | shape | content |
//! |---|---|---|
//! | `NAME.products` | (cols, group) | mean of x x^T over the inputs x, of columns in groups of `group`: (cols / group, group, group) |
//! | `NAME.count` | (1) | how many inputs; 0 if not measured yet |
//! | `NAME.kl` | (types) | mean KL divergence of the model with only this matrix in each type of `kestrel.calibration.types`; all 0 if not measured yet, infinite for types whose blocks do not divide a row |
//!
//! The embedding has no inputs, hence no products. While it grows the file is called `OUT.part`, and what a run needs only
//! for itself lies behind its end.

use crate::atomic_file::{AtomicFile, check_target, other_run};
use crate::gguf::{Gguf, TensorDecl, Value, layout};
use crate::map::{Map, f32s};
use crate::{Error, ErrorKind, GgmlType, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const TYPE: &str = "general.type";
const TYPES: &str = "kestrel.calibration.types";
const DATASET: &str = "kestrel.calibration.dataset";
const PRODUCTS: &str = ".products";
const COUNT: &str = ".count";
const KL: &str = ".kl";

/// A matrix of a calibration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CalibratedMatrix {
    /// Its GGUF name.
    pub name: String,
    /// Its columns.
    pub cols: usize,
    /// Columns of a group, or 0 for a matrix that has no inputs.
    pub group: usize,
}

/// What a calibration is made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CalibrationSource {
    /// The weights; equal for all quantizations of them.
    pub model: u64,
    /// A checksum of the tokens.
    pub tokens: u64,
    /// Tokens of a window.
    pub ctx: u32,
    /// The text's name.
    pub dataset: String,
    /// The types whose divergence is measured.
    pub types: Vec<GgmlType>,
}

/// What the inputs of a matrix are like.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct InputProducts<'a> {
    /// Mean products of the inputs, (cols / group, group, group).
    pub means: &'a [f32],
    /// Columns of a group.
    pub group: usize,
    /// How many inputs these are the means of, positive.
    pub count: f32,
}

/// A calibration file, mapped.
pub struct Calibration {
    file: Gguf,
    types: Vec<GgmlType>,
}

impl Calibration {
    /// Opens a file. Errors: whatever is wrong with the container, `Unexpected` for a GGUF file of another kind,
    /// `BadShape` and `WrongType` for tensors that are not as the table above says, `Missing` for one that lacks,
    /// `NotFinite` and `OutOfRange` for divergences that cannot be. Products are too many to be looked at here.
    pub fn open(path: &Path) -> Result<Self> {
        let file = Gguf::open(path)?;
        Self::of(file).map_err(|e| e.file(path))
    }

    /// As [`Self::open`], for a container that is open.
    pub fn of(file: Gguf) -> Result<Self> {
        let kind = file.metadata().str(TYPE)?;
        if kind != Some("calibration") {
            return Err(Error::new(ErrorKind::Unexpected)
                .what(format!("key \"{TYPE}\""))
                .expected("\"calibration\", as kestrel calibrate writes")
                .found(kind.map_or("none".into(), |k| k.chars().take(64).collect::<String>())));
        }
        let names = file.metadata().strings(TYPES)?;
        let ty = |name: &[u8]| {
            let name = String::from_utf8_lossy(name);
            GgmlType::from_name(&name).ok_or_else(|| {
                Error::new(ErrorKind::Unexpected)
                    .what(format!("key \"{TYPES}\""))
                    .expected("types")
                    .found(name)
            })
        };
        let types = names.iter().flat_map(|n| n.iter()).map(ty).collect::<Result<Vec<_>>>()?;
        if let Some(i) = (0..types.len()).find(|&i| types[..i].contains(&types[i])) {
            return Err(Error::new(ErrorKind::Duplicate)
                .what(format!("key \"{TYPES}\""))
                .expected("each type once")
                .found(types[i]));
        }
        for info in file.tensors() {
            let bad = |kind, expected: String| {
                let what = format!("tensor \"{}\"", info.name);
                Error::new(kind).at(info.offset).what(what).expected(expected)
            };
            if info.dtype != GgmlType::F32 {
                return Err(bad(ErrorKind::WrongType, "F32".into()).found(info.dtype));
            }
            let fits = if let Some(name) = info.name.strip_suffix(PRODUCTS) {
                if file.tensor(&format!("{name}{COUNT}")).is_none() {
                    return Err(bad(ErrorKind::Missing, format!("a tensor \"{name}{COUNT}\" too")));
                }
                matches!(info.shape[..], [cols, group] if group > 0 && cols % group == 0)
            } else if info.name.ends_with(KL) {
                info.shape == [types.len() as u64]
            } else {
                info.name.ends_with(COUNT) && info.shape == [1]
            };
            if !fits {
                return Err(bad(ErrorKind::BadShape, "a tensor of a calibration".into())
                    .found(format!("{:?}", info.shape)));
            }
        }
        let out = Self { file, types };
        for info in out.file.tensors().iter().filter(|t| t.name.ends_with(KL)) {
            if let Some(x) =
                out.floats(&info.name, "").and_then(|kl| kl.iter().find(|x| x.is_nan() || **x < 0.0))
            {
                let kind = if x.is_nan() { ErrorKind::NotFinite } else { ErrorKind::OutOfRange };
                let what = format!("tensor \"{}\"", info.name);
                return Err(Error::new(kind)
                    .at(info.offset)
                    .what(what)
                    .expected("no negative ones")
                    .found(x));
            }
        }
        Ok(out)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The types whose divergence was measured.
    pub fn types(&self) -> &[GgmlType] {
        &self.types
    }

    /// The text that it was made from.
    pub fn dataset(&self) -> Option<&str> {
        self.file.metadata().str(DATASET).ok().flatten()
    }

    /// Of the inputs of the matrix with this GGUF name; `None` if they were not measured.
    pub fn products(&self, gguf_name: &str) -> Option<InputProducts<'_>> {
        let tensor = self.file.tensor(&format!("{gguf_name}{PRODUCTS}"))?;
        let count = self.floats(gguf_name, COUNT)?.first().copied().filter(|&n| n > 0.0)?;
        let group = *tensor.info.shape.last()? as usize;
        Some(InputProducts { means: self.floats(gguf_name, PRODUCTS)?, group, count })
    }

    /// Mean KL divergence of the model with only this matrix in each of these types; `None` if not measured.
    pub fn divergence(&self, gguf_name: &str) -> Option<impl Iterator<Item = (GgmlType, f32)> + use<'_>> {
        let kl = self.floats(gguf_name, KL)?;
        let measured = kl.iter().any(|&x| x != 0.0);
        measured.then(|| self.types.iter().copied().zip(kl.iter().copied()).filter(|(_, kl)| kl.is_finite()))
    }

    /// The matrices that have a divergence, in the order of the file.
    pub fn matrices(&self) -> impl Iterator<Item = &str> {
        let names = self.file.tensors().iter().filter_map(|t| t.name.strip_suffix(KL));
        names.filter(|name| self.divergence(name).is_some())
    }

    /// The numbers in place; a file that places them at odd addresses has none.
    fn floats(&self, name: &str, suffix: &str) -> Option<&[f32]> {
        let tensor = self.file.tensor(&format!("{name}{suffix}"))?;
        let (map, range) = self.file.map_of(tensor.info);
        f32s(map.get(range)?)
    }
}

/// A calibration file that grows under the name `OUT.part`.
pub struct CalibrationWriter {
    file: AtomicFile,
    /// Where each tensor begins.
    offsets: BTreeMap<String, u64>,
    /// Bytes of the calibration.
    file_bytes: u64,
}

impl CalibrationWriter {
    /// Creates `OUT.part`, or goes on with what an interrupted run left there.
    ///
    /// Errors: `OutputExists` if the target exists and `force` is false, if there is a part and `resume` is false, or if
    /// another run is writing it; `Inconsistent` if the part is of another model, text or set of matrices; `Io`.
    pub fn open(
        target: &Path,
        source: &CalibrationSource,
        matrices: &[CalibratedMatrix],
        (force, resume): (bool, bool),
    ) -> Result<Self> {
        let target = check_target(target, force)?;
        let tensors = declarations(source, matrices);
        let layout = layout(&pairs(source), &tensors)?;
        let offsets = tensors.iter().zip(&layout.tensors).map(|(t, (offset, _))| (t.name.clone(), *offset));
        let offsets = offsets.collect();
        let file_bytes = layout.file_bytes;
        let file =
            AtomicFile::growing(&target, (file_bytes, file_bytes), (force, resume), &mut |file, found| {
                if !found {
                    return file.write_at(0, &layout.header).map(|()| true);
                }
                let map = Map::open(file.path())?;
                match map.len() as u64 >= file_bytes && map.starts_with(&layout.header) {
                    true => Ok(true),
                    false => Err(other_run(file.path(), "one of the same weights, text and options")),
                }
            })?;
        Ok(Self { file, offsets, file_bytes })
    }

    /// The file that grows.
    pub fn part(&self) -> &Path {
        self.file.path()
    }

    /// What was measured so far, as a file.
    pub fn so_far(&self) -> Result<Calibration> {
        Calibration::open(self.part())
    }

    /// Stores the mean products of `count` inputs. Errors: `NotFinite` if they are not, `Io`.
    pub fn products(&self, gguf_name: &str, products: &[f32], count: f32) -> Result<()> {
        if products.iter().any(|x| !x.is_finite()) {
            return Err(Error::new(ErrorKind::NotFinite)
                .what(format!("inputs of \"{gguf_name}\""))
                .expected("finite numbers")
                .hint("the weights are damaged; `kestrel verify` finds where"));
        }
        self.put(gguf_name, PRODUCTS, products)?;
        self.file.settle()?;
        self.put(gguf_name, COUNT, &[count])
    }

    /// Stores the divergence for each type.
    pub fn divergence(&self, gguf_name: &str, kl: &[f32]) -> Result<()> {
        let kl: Vec<f32> = kl.iter().map(|x| x.max(f32::MIN_POSITIVE)).collect();
        self.put(gguf_name, KL, &kl)
    }

    /// Keeps `bytes` at `offset` behind the end, for this run: on disk rather than in memory.
    pub fn set_aside(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.file.write_at(self.file_bytes.saturating_add(offset), bytes)
    }

    /// What was set aside at `offset`.
    pub fn read_aside(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        self.file.read_at(self.file_bytes.saturating_add(offset), bytes)
    }

    fn put(&self, gguf_name: &str, suffix: &str, numbers: &[f32]) -> Result<()> {
        let Some(&offset) = self.offsets.get(&format!("{gguf_name}{suffix}")) else {
            return Err(
                Error::new(ErrorKind::Missing).what(format!("matrix \"{gguf_name}\" in the calibration"))
            );
        };
        let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.file.write_at(offset, &bytes)
    }

    /// Gives the file its name.
    pub fn finish(self) -> Result<PathBuf> {
        let target = self.file.target().to_owned();
        self.file.commit(|part| Calibration::open(part).map(drop))?;
        Ok(target)
    }
}

fn pairs(source: &CalibrationSource) -> Vec<(String, Value)> {
    let types: Vec<String> = source.types.iter().map(|t| t.name().to_owned()).collect();
    let pairs: [(&str, Value); 6] = [
        (TYPE, "calibration".into()),
        ("kestrel.calibration.model", source.model.into()),
        ("kestrel.calibration.tokens", source.tokens.into()),
        ("kestrel.calibration.ctx", source.ctx.into()),
        (DATASET, source.dataset.as_str().into()),
        (TYPES, types.into()),
    ];
    pairs.map(|(key, value)| (key.to_owned(), value)).into()
}

fn declarations(source: &CalibrationSource, matrices: &[CalibratedMatrix]) -> Vec<TensorDecl> {
    let tensor = |name: String, shape: Vec<u64>| TensorDecl { name, dtype: GgmlType::F32, shape };
    let of_matrix = |m: &CalibratedMatrix| {
        let products = [
            tensor(format!("{}{PRODUCTS}", m.name), vec![m.cols as u64, m.group as u64]),
            tensor(format!("{}{COUNT}", m.name), vec![1]),
        ];
        let kl = tensor(format!("{}{KL}", m.name), vec![source.types.len() as u64]);
        products.into_iter().filter(|_| m.group > 0).chain([kl]).collect::<Vec<_>>()
    };
    matrices.iter().flat_map(of_matrix).collect()
}

/// Columns of a group, at most `most`: all of them, or else the largest multiple of 256 that divides `cols`, or of 32.
pub fn group_len(cols: usize, most: usize) -> usize {
    if cols <= most {
        return cols;
    }
    let largest = |step: usize| (1..=most / step).rev().map(|n| n * step).find(|n| cols.is_multiple_of(*n));
    largest(256).or_else(|| largest(32)).unwrap_or(cols)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source() -> CalibrationSource {
        let types = vec![GgmlType::Q3K, GgmlType::Q4K];
        CalibrationSource { model: 1, tokens: 2, ctx: 512, dataset: "text".into(), types }
    }

    fn folder(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("kestrel-calibration-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    #[test]
    fn what_was_written_is_read_and_an_interrupted_run_goes_on() {
        let dir = folder("roundtrip");
        let target = dir.join("c.gguf");
        let matrices = [
            CalibratedMatrix { name: "a".into(), cols: 4, group: 2 },
            CalibratedMatrix { name: "embd".into(), cols: 4, group: 0 },
        ];
        let writer = CalibrationWriter::open(&target, &source(), &matrices, (false, false)).unwrap();
        let products = [2.0, 1.0, 1.0, 2.0, 3.0, 0.5, 0.5, 3.0];
        writer.products("a", &products, 7.0).unwrap();
        writer.set_aside(3, &[5; 9]).unwrap();
        let mut aside = [0; 2];
        writer.read_aside(10, &mut aside).unwrap();
        assert_eq!(aside, [5; 2]);
        assert!(writer.so_far().unwrap().divergence("a").is_none());
        drop(writer);
        let open = |source: &CalibrationSource, resume| {
            CalibrationWriter::open(&target, source, &matrices, (false, resume)).map_err(|e| e.kind())
        };
        assert_eq!(open(&source(), false).err(), Some(ErrorKind::OutputExists));
        assert_eq!(
            open(&CalibrationSource { tokens: 3, ..source() }, true).err(),
            Some(ErrorKind::Inconsistent)
        );
        let writer = open(&source(), true).unwrap();
        writer.divergence("embd", &[0.5, 0.0]).unwrap();
        writer.divergence("a", &[f32::INFINITY, 0.25]).unwrap();
        writer.finish().unwrap();
        let read = Calibration::open(&target).unwrap();
        assert!(read.file.warnings().is_empty(), "nothing follows the last tensor");
        assert_eq!(read.products("a"), Some(InputProducts { means: &products, group: 2, count: 7.0 }));
        assert_eq!(read.products("embd"), None);
        assert_eq!(read.divergence("a").unwrap().collect::<Vec<_>>(), [(GgmlType::Q4K, 0.25)]);
        assert_eq!(read.matrices().collect::<Vec<_>>(), ["a", "embd"]);
        assert_eq!(read.dataset(), Some("text"));
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn other_files_are_refused() {
        let dir = folder("refused");
        let write = |name: &str, pairs: &[(String, Value)], tensors: &[TensorDecl]| {
            let layout = layout(pairs, tensors).unwrap();
            let mut bytes = layout.header;
            bytes.resize(layout.file_bytes as usize, 0);
            std::fs::write(dir.join(name), bytes).unwrap();
            Calibration::open(&dir.join(name)).err().map(|e| e.kind())
        };
        let tensor =
            |name: &str, dtype, shape: &[u64]| TensorDecl { name: name.into(), dtype, shape: shape.into() };
        let f32 = GgmlType::F32;
        assert_eq!(write("none", &[], &[]), Some(ErrorKind::Unexpected));
        assert_eq!(write("empty", &pairs(&source()), &[]), None);
        let twice =
            CalibrationSource { types: vec![GgmlType::Q4K, GgmlType::Q6K, GgmlType::Q4K], ..source() };
        assert_eq!(write("twice", &pairs(&twice), &[]), Some(ErrorKind::Duplicate));
        assert_eq!(
            write("f16", &pairs(&source()), &[tensor("a.kl", GgmlType::F16, &[2])]),
            Some(ErrorKind::WrongType)
        );
        assert_eq!(write("kl", &pairs(&source()), &[tensor("a.kl", f32, &[3])]), Some(ErrorKind::BadShape));
        assert_eq!(
            write("lone", &pairs(&source()), &[tensor("a.products", f32, &[4, 2])]),
            Some(ErrorKind::Missing)
        );
        let uneven = [tensor("a.products", f32, &[5, 2]), tensor("a.count", f32, &[1])];
        assert_eq!(write("uneven", &pairs(&source()), &uneven), Some(ErrorKind::BadShape));
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn groups_divide_the_columns() {
        assert_eq!(group_len(512, 1024), 512);
        assert_eq!(group_len(8192, 1024), 1024);
        assert_eq!(group_len(768 * 3, 1024), 768);
        assert_eq!(group_len(96, 64), 32);
    }
}
