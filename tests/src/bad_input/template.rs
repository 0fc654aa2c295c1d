//! Chat templates that do harm. None may stop a model from loading; with `--chat` a template that does not render is
//! told and ChatML takes its place, if the vocabulary has its tokens.

use super::*;

/// All cases of this part.
pub(super) fn cases() -> Vec<Case> {
    let t = |name: &str, template: &str, action, expect| {
        let file = with_vocabulary().kv("tokenizer.chat_template", Raw::str(template.as_bytes()));
        case(name, file, expect).group("template").by(action)
    };
    let chatml =
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}";
    let nested = format!("{}{}", "{% if true %}".repeat(50_000), "{% endif %}".repeat(50_000));
    let brackets = format!("{{{{ {}{} }}}}", "[".repeat(50_000), "]".repeat(50_000));
    let minus = format!("{{{{ {}1 }}}}", "-".repeat(50_000));
    let ranges = "{% for i in range(10000000000) %}{% endfor %}";
    let loops = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
    let macro_of_itself = "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}";
    let output = "{% for i in range(99999) %}{{ 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx' * 999 }}{% endfor %}";
    let doubling = "{% set n = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}";
    let failed = Warn("chat template");
    use Action::{Chat, Run, Tokenize};
    vec![
        t("valid_template", chatml, Chat, Accept),
        t("T17 nested_50k_loads", &nested, Tokenize, Accept),
        t("T17 nested_50k_runs", &nested, Run, Accept),
        t("T17 nested_50k", &nested, Chat, failed),
        t("T17 brackets_50k", &brackets, Chat, failed),
        t("T17 minus_50k", &minus, Chat, failed),
        t("T18 range_1e10_loads", ranges, Run, Accept),
        t("T18 range_1e10", ranges, Chat, failed),
        t("T18 loops_1e8", loops, Chat, failed),
        t("T19 recursive_macro", macro_of_itself, Chat, failed),
        t("T20 output_over_limit", output, Chat, failed),
        t("T20 string_doubling", doubling, Chat, failed),
        t("T21 class", "{{ ''.__class__.__mro__ }}", Chat, failed),
        t("T21 attr_filter", "{{ ''|attr('__class__') }}", Chat, failed),
        t("T21 include", "{% include '/etc/passwd' %}", Chat, failed),
        t("T21 import", "{% import 'os' as os %}", Chat, failed),
        t("T21 raise_exception", "{{ raise_exception('no') }}", Chat, failed),
        t("T21 syntax", "{% if %}", Chat, failed),
        t("T21 no_message", "<|im_start|>", Chat, failed),
        t("T21 empty", "", Chat, failed),
    ]
}
