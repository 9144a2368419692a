//! `turret-operator validate` as a pipeline runs it: files in, lines and an exit code out.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

const GROUP: &str = "
apiVersion: turret.dev/v1alpha1
kind: ModelGroup
metadata: {name: g}
spec: {base: {source: {uri: 'file:///models/g'}}}
";

/// Exit code, standard output, standard error.
fn validate(folder: &Path, words: &[&str], stdin: &str) -> (Option<i32>, String, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_turret-operator"))
        .arg("validate")
        .args(words)
        .current_dir(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(stdin.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn the_exit_code_says_how_it_went() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    write("good.yaml", GROUP);
    write("bad.yaml", &GROUP.replace("name: g", "name: b").replace("base:", "bases:"));
    write("torn.yaml", "a: [\n");

    let good = validate(folder.path(), &["-f", "good.yaml"], "");
    assert_eq!((good.0, good.1.as_str()), (Some(0), ""), "{good:?}");
    assert_eq!(good.2, "checked 1 object: 0 errors, 0 warnings, 0 notes\n");

    let bad = validate(folder.path(), &["-f", "good.yaml", "-f", "bad.yaml", "--namespace", "team"], "");
    let lines: Vec<_> = bad.1.lines().collect();
    assert_eq!(
        lines[..2],
        [
            "bad.yaml:1 ModelGroup/team/b: spec.bases: unknown field \"spec.bases\"",
            "bad.yaml:1 ModelGroup/team/b: spec.base: Required value",
        ]
    );
    assert_eq!((bad.0, lines.len()), (Some(1), 3), "{bad:?}");

    let torn = validate(folder.path(), &["-f", "."], "");
    assert!(torn.1.starts_with("./torn.yaml: cannot be read: "), "{torn:?}");
    assert_eq!(torn.0, Some(2));
}

#[test]
fn standard_input_is_read_and_json_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let placement = "apiVersion: turret.dev/v1alpha1\nkind: ModelPlacement\nmetadata: {name: p}\nspec: {groups: [{name: x}]}\n";
    let text = format!("{GROUP}---\n{placement}---\napiVersion: v1\nkind: Service\n");
    let (code, out, err) = validate(folder.path(), &["-f", "-", "--output", "json"], &text);
    assert_eq!((code, err.as_str()), (Some(0), ""));
    let printed: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(
        printed,
        json!({
            "valid": true,
            "objects": 2,
            "skipped": {"v1 Service": 1},
            "problems": [{
                "file": "-",
                "document": 2,
                "kind": "ModelPlacement",
                "namespace": "default",
                "name": "p",
                "severity": "note",
                "path": "spec.groups[0]",
                "message": "ModelGroup `x` is not among the files, so it was not checked with it",
            }],
            "unreadable": [],
        })
    );
}
