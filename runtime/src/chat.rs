//! Chat templates: Jinja that a model brings along, rendered in a sandbox.
//!
//! A template is a program from a stranger. It sees the messages and two texts and nothing of this process, of files,
//! of other templates or of the environment. Every step and every 64 bytes that it makes or reads cost fuel, which so
//! bounds its time and its memory; nesting and output have limits of their own.

use kestrel_formats::{Error, ErrorKind, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Value, context};
use std::io::Write;

/// Bytes of a template; published ones have a few KiB, the longest some 20.
const TEMPLATE_BYTES_MAX: usize = 32 << 10;
/// Stack of the thread that renders. Parsing, compiling and dropping a template recurse at most once per byte of it
/// (`{{ ----1 }}`), at less than 2 KiB each; only the pages in use exist.
const STACK_BYTES: usize = 2048 * TEMPLATE_BYTES_MAX;
/// Steps, or 64 bytes each, of a rendering. A template of an instruct model takes some hundred per message.
const FUEL: u64 = 50_000;
/// Nesting of macros and blocks while rendering; the parser has a limit of its own.
const RECURSION_MAX: usize = 64;
/// Bytes of a rendered conversation.
const OUTPUT_BYTES_MAX: usize = 1 << 20;

/// One message of a conversation.
#[derive(Clone, Copy, Debug)]
pub struct Message<'a> {
    /// `user`, `assistant` or `system`.
    pub role: &'a str,
    /// The text.
    pub content: &'a str,
}

/// Everything beside the template that a rendering depends on.
#[derive(Clone, Copy, Debug)]
pub struct Conversation<'a> {
    /// In order.
    pub messages: &'a [Message<'a>],
    /// Text of the token that begins a text; empty if there is none.
    pub bos_token: &'a str,
    /// Text of the token that ends a text; empty if there is none.
    pub eos_token: &'a str,
}

/// The text of a conversation and of the beginning of the answer, as transformers' `apply_chat_template` with
/// `add_generation_prompt` makes it.
///
/// Errors: `BadTemplate` with the reason, `Limit` if it is too large, takes too long or writes too much.
pub fn render(template: &str, conversation: &Conversation) -> Result<String> {
    if template.len() > TEMPLATE_BYTES_MAX {
        return Err(limit(format!("at most {TEMPLATE_BYTES_MAX} bytes")).found(template.len()));
    }
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("kestrel-chat".into()).stack_size(STACK_BYTES);
        match thread.spawn_scoped(scope, || render_here(template, conversation)).map(|t| t.join()) {
            Ok(Ok(rendered)) => rendered,
            Ok(Err(panic)) => std::panic::resume_unwind(panic),
            Err(e) => {
                Err(Error::new(ErrorKind::Limit).what("starting a thread for the chat template").found(e))
            }
        }
    })
}

fn render_here(template: &str, conversation: &Conversation) -> Result<String> {
    let env = environment().map_err(|e| bad(&e))?;
    let template = env.template_from_str(template).map_err(|e| bad(&e))?;
    let message = |m: &Message| context! { role => m.role, content => m.content };
    let values = context! {
        messages => conversation.messages.iter().map(message).collect::<Vec<_>>(),
        bos_token => conversation.bos_token,
        eos_token => conversation.eos_token,
        add_generation_prompt => true,
    };
    let mut output = Bounded(Vec::new());
    let rendered = template.render_captured_to(values, &mut output).map(drop);
    match rendered {
        _ if output.0.len() > OUTPUT_BYTES_MAX => {
            Err(limit(format!("at most {OUTPUT_BYTES_MAX} bytes of text")))
        }
        Err(e) if e.kind() == minijinja::ErrorKind::OutOfFuel => Err(limit(format!("at most {FUEL} steps"))),
        Err(e) => Err(bad(&e)),
        Ok(()) => Ok(String::from_utf8_lossy(&output.0).into_owned()),
    }
}

fn environment<'s>() -> std::result::Result<Environment<'s>, minijinja::Error> {
    let mut env = Environment::new();
    env.set_fuel(Some(FUEL));
    env.set_recursion_limit(RECURSION_MAX);
    // As transformers sets them.
    env.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    // Methods of Python's strings and lists: most templates use some.
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.add_function("raise_exception", |text: String| -> std::result::Result<Value, minijinja::Error> {
        Err(minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, text))
    });
    Ok(env)
}

/// Stops the rendering once it has written too much.
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let room = (OUTPUT_BYTES_MAX + 1).saturating_sub(self.0.len());
        if room == 0 {
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
        let n = bytes.len().min(room);
        self.0.extend_from_slice(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn limit(expected: String) -> Error {
    Error::new(ErrorKind::Limit).what("chat template").expected(expected)
}

/// The engine's message, which may quote the template, cut to a readable length.
fn bad(e: &minijinja::Error) -> Error {
    let text: String = e.to_string().chars().take(200).collect();
    Error::new(ErrorKind::BadTemplate).what("chat template").expected("a template that renders").found(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rendered(template: &str) -> Result<String> {
        let messages =
            [Message { role: "system", content: "Be brief." }, Message { role: "user", content: " Why?\n" }];
        render(template, &Conversation { messages: &messages, bos_token: "<s>", eos_token: "</s>" })
    }

    /// The template of falcon-mamba-7b-instruct, and constructs that other published templates use.
    #[test]
    fn published_templates_render() {
        let chatml = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + \
                      '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}\
                      {% endif %}";
        assert_eq!(
            rendered(chatml).unwrap(),
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Why?\n<|im_end|>\n<|im_start|>assistant\n"
        );
        let other = "{{ bos_token }}{%- set ns = namespace(system='') -%}\n{%- for m in messages if m.role == 'system' \
                     -%}\n  {%- set ns.system = m.content.strip() -%}\n{%- endfor -%}\n{% for m in messages[1:] %}\n\
                     [{{ loop.index0 }}]{{ ns.system }} {{ m['content'] | trim }}{% if loop.last %}{{ eos_token }}\
                     {% endif %}\n{% endfor %}";
        assert_eq!(rendered(other).unwrap(), "<s>[0]Be brief. Why?</s>");
        assert_eq!(rendered("{{ messages | tojson | length > 10 }}").unwrap(), "True");
    }

    #[test]
    fn limits_hold_and_failures_are_typed() {
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
        let output = "{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}";
        let template = "x".repeat(TEMPLATE_BYTES_MAX + 1);
        for text in [endless, output, &template] {
            assert_eq!(rendered(text).unwrap_err().kind(), ErrorKind::Limit);
        }
        for text in ["{% if %}", "{{ 1 / 0 }}", "{{ raise_exception('no') }}", "{% include 'x' %}"] {
            assert_eq!(rendered(text).unwrap_err().kind(), ErrorKind::BadTemplate, "{}", &text[..8]);
        }
        assert!(
            rendered("{{ raise_exception('only users') }}").unwrap_err().to_string().contains("only users")
        );
    }

    /// Whatever nests does not overflow the stack, as deep as a template is long. An overflow would end the tests.
    #[test]
    fn nesting_cannot_overflow_the_stack() {
        let repeated = |open: &str, middle: &str, close: &str| {
            let n = (TEMPLATE_BYTES_MAX - 100) / (open.len() + close.len());
            format!("{}{middle}{}", open.repeat(n), close.repeat(n))
        };
        let in_tag =
            |open: &str, middle: &str, close: &str| format!("{{{{ {} }}}}", repeated(open, middle, close));
        let templates = [
            in_tag("-", "1", ""),
            in_tag("not ", "a", ""),
            in_tag("(", "1", ")"),
            in_tag("[", "1", "]"),
            in_tag("{1:", "1", "}"),
            in_tag("1+", "1", ""),
            in_tag("1~", "1", ""),
            in_tag("1**", "1", ""),
            in_tag("a and ", "a", ""),
            in_tag("1<", "1", ""),
            in_tag("a[", "a", "]"),
            in_tag("a(", "a", ")"),
            in_tag("", "a", ".a"),
            in_tag("", "a", "|e"),
            in_tag("", "a", "[0]"),
            in_tag("", "a", "()"),
            in_tag("", "a", " is b"),
            in_tag("a if a else ", "a", ""),
            repeated("{%if a%}", "", "{%endif%}"),
            repeated("{%if a%}", "", ""),
            repeated("{%for a in b%}", "", "{%endfor%}"),
            repeated("{%macro a()%}", "", "{%endmacro%}"),
            repeated("{%set a%}", "", "{%endset%}"),
            repeated("{%with%}", "", "{%endwith%}"),
            repeated("{%filter e%}", "", "{%endfilter%}"),
            format!("{{%if a%}}{}{{%endif%}}", repeated("{%elif a%}", "", "")),
        ];
        for template in templates {
            // What comes out does not matter.
            let started = std::time::Instant::now();
            let _ = rendered(&template);
            let took = started.elapsed();
            assert!(took.as_secs() < 30, "{took:?}: {}", &template[..40]);
        }
    }
}
