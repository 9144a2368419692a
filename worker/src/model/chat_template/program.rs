//! A template's program: minijinja's own, with a price on every step whose cost depends on its operands.
//!
//! minijinja bounds steps and nothing else: operators are not functions that an environment can replace. Its compiler
//! however hands out the program it makes, and there they are replaced by filters (`operators.rs`) that do the same and
//! pay for it (`budget.rs`). Nothing here decides what a template means, and no syntax is parsed here.

use minijinja::machinery::{CodeGenerator, Instruction, Instructions, Token, Tokenizer, parse};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Error, ErrorKind, Value};

use super::NAME;

/// Operators, attributes, calls and filters that one tag may have: as deep as an expression may be.
const MAX_TAG_DEPTH: usize = 600;
/// Branches that one `if` may have.
const MAX_BRANCHES: usize = 200;
/// No slot to remember a filter in.
const UNCACHED: u8 = !0;

/// Writes a template in the form that `compile` takes: whitespace is controlled already, text is an expression like any
/// other (and so is paid for where it is captured), and `{% generation %}`, which marks what a model is trained on and has a
/// scope of its own, is `{% with %}`. Lines stay where they are.
pub fn normal_form(source: &str) -> Result<String, Error> {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
    let mut tokens = Tokenizer::new(&source, NAME, false, syntax);
    let mut form = NormalForm { text: String::with_capacity(source.len() * 2), line: 1 };
    let mut limits = Limits::default();
    let (mut opens_block, mut ends_operand) = (false, false);
    while let Some((token, span)) = tokens.next_token()? {
        limits.admit(&token, opens_block)?;
        let written = &source[span.start_offset as usize..span.end_offset as usize];
        match &token {
            Token::TemplateData(data) => {
                form.push("{{ '");
                form.push(&data.replace('\\', "\\\\").replace('\'', "\\'"));
                form.push("' }}");
            }
            Token::VariableStart => form.open("{{ ", span.start_line),
            Token::BlockStart => form.open("{% ", span.start_line),
            Token::VariableEnd => form.push("}}"),
            Token::BlockEnd => form.push("%}"),
            Token::Ident("generation") if opens_block => form.push("with "),
            Token::Ident("endgeneration") if opens_block => form.push("endwith "),
            // Products of literals are otherwise computed while compiling, where nothing pays for them.
            Token::Mul if ends_operand => form.push("|_ * "),
            _ => {
                form.reach_line(span.start_line);
                form.push(written);
                form.push(" ");
            }
        }
        opens_block = matches!(token, Token::BlockStart);
        ends_operand = matches!(
            token,
            Token::Ident(_)
                | Token::Str(_)
                | Token::String(_)
                | Token::Int(_)
                | Token::Int128(_)
                | Token::Float(_)
                | Token::ParenClose
                | Token::BracketClose
                | Token::BraceClose
        );
    }
    Ok(form.text)
}

struct NormalForm {
    text: String,
    line: u16,
}

impl NormalForm {
    fn push(&mut self, text: &str) {
        let lines = text.bytes().filter(|&byte| byte == b'\n').count();
        self.line = self.line.saturating_add(u16::try_from(lines).unwrap_or(u16::MAX));
        self.text.push_str(text);
    }

    fn open(&mut self, mark: &str, line: u16) {
        self.push(mark);
        self.reach_line(line);
    }

    fn reach_line(&mut self, line: u16) {
        let missing = line.saturating_sub(self.line);
        self.push(&"\n".repeat(usize::from(missing)));
    }
}

/// What minijinja's parser and compiler descend into without counting.
#[derive(Default)]
struct Limits {
    tag_depth: usize,
    branches: Vec<usize>,
}

impl Limits {
    fn admit(&mut self, token: &Token, opens_block: bool) -> Result<(), Error> {
        match token {
            Token::VariableStart | Token::BlockStart => self.tag_depth = 0,
            Token::Ident("if") if opens_block => self.branches.push(0),
            Token::Ident("elif") if opens_block => {
                if let Some(branches) = self.branches.last_mut() {
                    *branches += 1;
                }
            }
            Token::Ident("endif") if opens_block => {
                self.branches.pop();
            }
            Token::Ident("and" | "or" | "not" | "if" | "in" | "is") => self.tag_depth += 1,
            Token::Plus
            | Token::Minus
            | Token::Mul
            | Token::Div
            | Token::FloorDiv
            | Token::Pow
            | Token::Mod
            | Token::Dot
            | Token::Tilde
            | Token::Pipe
            | Token::BracketOpen
            | Token::ParenOpen
            | Token::BraceOpen => self.tag_depth += 1,
            _ => {}
        }
        let refused = |what| Err(Error::new(ErrorKind::SyntaxError, what));
        if matches!(token, Token::Ident("do")) && opens_block {
            return refused("`do` is no tag of chat templates".to_owned());
        }
        if self.tag_depth > MAX_TAG_DEPTH {
            return refused(format!("a tag has more than {MAX_TAG_DEPTH} operators and accesses"));
        }
        if self.branches.last().is_some_and(|&branches| branches > MAX_BRANCHES) {
            return refused(format!("an `if` has more than {MAX_BRANCHES} branches"));
        }
        Ok(())
    }
}

/// Compiles a source in normal form.
pub fn compile(source: &str) -> Result<Instructions<'_>, Error> {
    let template = parse(source, NAME, SyntaxConfig::default())?;
    let mut generator = CodeGenerator::new(NAME, source);
    generator.compile_stmt(&template);
    let (program, blocks) = generator.finish();
    // They are for templates that extend others, and call each other without what bounds macros.
    match blocks.is_empty() {
        true => Ok(priced(&program)),
        false => Err(Error::new(ErrorKind::SyntaxError, "`block` is no tag of chat templates")),
    }
}

/// The same program with paying steps. Jumps are told where their targets went.
fn priced<'s>(program: &Instructions<'s>) -> Instructions<'s> {
    let mut out = Instructions::new(program.name(), program.source());
    let (mut places, mut end) = (Vec::new(), 0);
    for (pc, instruction) in (0..).map_while(|pc| Some((pc, program.get(pc)?))) {
        places.push(end);
        let line = u16::try_from(program.get_line(pc).unwrap_or(0)).unwrap_or(u16::MAX);
        for step in paying(instruction) {
            end = out.add_with_line(step, line) + 1;
        }
    }
    places.push(end);
    for pc in 0..end {
        if let Some(
            Instruction::Jump(target)
            | Instruction::JumpIfFalse(target)
            | Instruction::JumpIfFalseOrPop(target)
            | Instruction::JumpIfTrueOrPop(target)
            | Instruction::Iterate(target)
            | Instruction::BuildMacro(_, target, _),
        ) = out.get_mut(pc)
        {
            *target = places[*target as usize];
        }
    }
    out
}

/// One step, as steps that pay.
fn paying<'s>(instruction: &Instruction<'s>) -> Vec<Instruction<'s>> {
    let filter = |name, operands| Instruction::ApplyFilter(name, Some(operands), UNCACHED);
    let same = instruction.clone();
    match instruction {
        Instruction::EmitRaw(text) => vec![Instruction::LoadConst(Value::from(*text)), Instruction::Emit],
        Instruction::Add => vec![filter("+", 2)],
        Instruction::Mul => vec![filter("*", 2)],
        Instruction::Rem => vec![filter("%", 2)],
        Instruction::StringConcat => vec![filter("~", 2)],
        Instruction::Eq => vec![filter("==", 2)],
        Instruction::Ne => vec![filter("!=", 2)],
        Instruction::Lt => vec![filter("<", 2)],
        Instruction::Lte => vec![filter("<=", 2)],
        Instruction::Gt => vec![filter(">", 2)],
        Instruction::Gte => vec![filter(">=", 2)],
        Instruction::In => vec![filter("in", 2)],
        Instruction::GetItem => vec![filter("[]", 2)],
        Instruction::Slice => vec![filter("[:]", 4)],
        Instruction::PushLoop(_) => vec![filter("for", 1), same],
        Instruction::BuildList(_) | Instruction::BuildTuple(_) | Instruction::BuildMap(_) => {
            vec![same, filter("keep", 1)]
        }
        Instruction::SetAttr(_) => {
            vec![Instruction::Swap, filter("keep", 1), Instruction::Swap, same]
        }
        Instruction::CompareAndPreserve(_) => {
            vec![filter("weigh", 1), Instruction::Swap, filter("weigh", 1), Instruction::Swap, same]
        }
        _ => vec![same],
    }
}
