//! Modules: what the PTX text says of its kernels and variables. The code itself is not read; `kernels` has it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use crate::code::{INVALID_HANDLE, INVALID_IMAGE, NOT_FOUND, Result};
use crate::kernels::{self, Kernel};
use crate::space;

/// A kernel with the sizes of its parameters in bytes.
pub struct Function {
    /// What it does.
    pub kernel: Kernel,
    /// Sizes of its parameters.
    pub params: Vec<usize>,
}

/// A loaded module.
struct Module {
    functions: HashMap<String, usize>,
    /// Address and size of each variable.
    variables: HashMap<String, (u64, u64)>,
}

#[derive(Default)]
struct Registry {
    modules: HashMap<usize, Module>,
    functions: HashMap<usize, Arc<Function>>,
    next: usize,
}

static REGISTRY: Mutex<Option<Registry>> = Mutex::new(None);

fn registry<T>(f: impl FnOnce(&mut Registry) -> T) -> T {
    f(REGISTRY.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert_default())
}

fn type_size(word: &str) -> Option<usize> {
    match word.trim_start_matches('.').trim_start_matches(['u', 's', 'b', 'f']) {
        "64" => Some(8),
        "32" => Some(4),
        "16" => Some(2),
        "8" => Some(1),
        _ => None,
    }
}

/// `.entry NAME(` … `)`: names and parameter sizes.
fn entries(ptx: &str) -> Vec<(String, Vec<usize>)> {
    let mut found = Vec::new();
    for part in ptx.split(".entry").skip(1) {
        let Some((head, rest)) = part.split_once('(') else { continue };
        let params = rest.split_once(')').map_or("", |p| p.0);
        let sizes = params.split(',').filter_map(|p| p.split_whitespace().find_map(type_size)).collect();
        found.push((head.trim().to_string(), sizes));
    }
    found
}

/// `.global … .u32 NAME;`: names and sizes of plain variables.
fn variables(ptx: &str) -> Vec<(String, u64)> {
    ptx.lines()
        .filter(|l| l.trim_start_matches(".visible").trim_start().starts_with(".global"))
        .filter_map(|l| {
            let words: Vec<_> = l.trim_end_matches(';').split_whitespace().collect();
            let size =
                words.iter().filter(|w| w.starts_with('.')).filter_map(|w| type_size(w)).next_back()?;
            Some((words.last()?.to_string(), size as u64))
        })
        .collect()
}

/// Loads a module from PTX text.
pub fn load(ptx: &str) -> Result<usize> {
    let device = crate::context::current().map_or(0, |c| c.device);
    if !ptx.contains(".version") {
        return Err(INVALID_IMAGE);
    }
    let mut placed = HashMap::new();
    for (name, size) in variables(ptx) {
        placed.insert(name, (space::change(|s| s.allocate(device, size))?, size));
    }
    registry(|r| {
        let mut module = Module { functions: HashMap::new(), variables: placed };
        for (name, params) in entries(ptx) {
            if let Some(kernel) = kernels::find(&name) {
                r.next += 0x10;
                r.functions.insert(r.next, Arc::new(Function { kernel, params }));
                module.functions.insert(name, r.next);
            }
        }
        r.next += 0x10;
        r.modules.insert(r.next, module);
        Ok(r.next)
    })
}

/// Unloads a module.
pub fn unload(module: usize) -> Result<()> {
    let module = registry(|r| {
        let module = r.modules.remove(&module).ok_or(INVALID_HANDLE)?;
        module.functions.values().for_each(|f| drop(r.functions.remove(f)));
        Ok::<Module, crate::code::Code>(module)
    })?;
    module.variables.values().try_for_each(|(address, _)| space::change(|s| s.free(*address)))
}

/// A kernel's handle.
pub fn function(module: usize, name: &str) -> Result<usize> {
    registry(|r| {
        let module = r.modules.get(&module).ok_or(INVALID_HANDLE)?;
        module.functions.get(name).copied().ok_or(NOT_FOUND)
    })
}

/// A variable's address and size.
pub fn variable(module: usize, name: &str) -> Result<(u64, u64)> {
    registry(|r| {
        let module = r.modules.get(&module).ok_or(INVALID_HANDLE)?;
        module.variables.get(name).copied().ok_or(NOT_FOUND)
    })
}

/// A kernel's first variable of that name in any loaded module: kernels that use variables find them so.
pub fn variable_of_any(name: &str) -> Option<u64> {
    registry(|r| r.modules.values().find_map(|m| m.variables.get(name).map(|v| v.0)))
}

/// A kernel by its handle.
pub fn get(function: usize) -> Result<Arc<Function>> {
    registry(|r| r.functions.get(&function).cloned().ok_or(INVALID_HANDLE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_sizes_are_read_from_the_text() {
        let ptx = include_str!("../../sample/kernels/sample.ptx");
        let entries = entries(ptx);
        assert!(entries.contains(&("advance".into(), vec![8, 8, 4])), "{entries:?}");
        assert!(entries.contains(&("count_generation".into(), vec![])));
        assert_eq!(variables(ptx), vec![("generation".to_string(), 4)]);
        assert_eq!(load("not ptx"), Err(INVALID_IMAGE));
    }
}
