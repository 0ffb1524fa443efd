//! `walden man` and `walden completions SHELL`: made from the definition of the commands, so that they never differ from it.

use clap_complete::Shell;
use clap_mangen::Man;

use super::args::ShellName;
use super::error::CliError;
use super::exit;
use super::output::Output;

const FILES: &str = ".SH FILES
.TP
\\fI/etc/walden/walden.toml\\fR
The configuration, where neither \\-\\-config nor WALDEN_CONFIG names another.
.SH ENVIRONMENT
.TP
\\fBWALDEN_CONFIG\\fR
The configuration file.
.TP
\\fBWALDEN_\\fISECTION\\fB__\\fIKEY\\fR
Any setting, such as WALDEN_ARCHIVE__CLUSTER or WALDEN_REPOSITORY__0__BUCKET; before the file, after a flag.
.TP
\\fBDATABASE_URL\\fR, \\fBPGHOST\\fR, \\fBPGUSER\\fR, \\fBPGPASSWORD\\fR, ...
The server, as for psql.
.SH SEE ALSO
\\fBpsql\\fR(1), \\fBpg_receivewal\\fR(1), \\fBpg_basebackup\\fR(1)
";

pub fn run(output: &Output) -> Result<u8, CliError> {
    output.line(page().trim_end())?;
    Ok(exit::DONE)
}

pub fn completions(output: &Output, shell: ShellName) -> Result<u8, CliError> {
    output.line(script(shell).trim_end())?;
    Ok(exit::DONE)
}

pub(super) fn script(shell: ShellName) -> String {
    let generator = match shell {
        ShellName::Bash => Shell::Bash,
        ShellName::Fish => Shell::Fish,
        ShellName::Zsh => Shell::Zsh,
    };
    let mut script = Vec::new();
    clap_complete::generate(generator, &mut super::command(), "walden", &mut script);
    String::from_utf8(script).expect("names and help are UTF-8")
}

/// One page, in roff: what every command has, then each command with its own flags and examples.
pub(super) fn page() -> String {
    let command = super::command();
    let main = Man::new(command.clone()).manual("Walden");
    let mut page = rendered(|out| main.render_title(out));
    page.push_str(&rendered(|out| main.render_name_section(out)));
    page.push_str(".SH SYNOPSIS\n\\fBwalden\\fR [\\fIOPTIONS\\fR] \\fICOMMAND\\fR [\\fIARGUMENTS\\fR]\n");
    page.push_str(".SH COMMANDS\n");
    for subcommand in command.get_subcommands() {
        let name = escaped(subcommand.get_name());
        page.push_str(&format!(".SS \"walden {name}\"\n"));
        page.push_str(&rendered(|out| Man::new(subcommand.clone()).render_description_section(out)).without_headings());
        // Without what `build` adds: help, and the flags of every command.
        if subcommand.get_arguments().next().is_some() {
            let own = subcommand.clone().disable_help_flag(true);
            page.push_str(&rendered(|out| Man::new(own).render_options_section(out)).without_headings());
        }
        page.push_str(&as_it_stands(subcommand));
    }
    page.push_str(&rendered(|out| main.render_options_section(out)));
    page.push_str(".SH \"EXAMPLES AND EXIT STATUS\"\n");
    page.push_str(&as_it_stands(&command));
    page.push_str(FILES);
    page
}

fn rendered(render: impl FnOnce(&mut dyn std::io::Write) -> std::io::Result<()>) -> String {
    let mut bytes = Vec::new();
    render(&mut bytes).expect("writing to memory cannot fail");
    String::from_utf8(bytes).expect("names and help are UTF-8")
}

trait Headings {
    /// Sections of a command's own page become text below its heading.
    fn without_headings(&self) -> String;
}

impl Headings for String {
    fn without_headings(&self) -> String {
        // The generator's preamble, which the page has once already, ends before its first section.
        let from = self.find(".SH ").unwrap_or(self.len());
        self[from..].split_inclusive('\n').filter(|line| !line.starts_with(".SH ")).collect()
    }
}

/// The text below a command's help, line for line: it has examples.
fn as_it_stands(command: &clap::Command) -> String {
    let Some(text) = command.get_after_help() else { return String::new() };
    let mut out = String::from(".PP\n");
    let mut literal = false;
    for line in text.to_string().lines() {
        // Examples are indented, and keep their columns; the rest is running text.
        if line.starts_with(' ') != literal {
            literal = !literal;
            out.push_str(if literal { ".nf\n" } else { ".fi\n" });
        }
        out.push_str(&if line.is_empty() { ".PP".to_owned() } else { escaped(line) });
        out.push('\n');
    }
    if literal {
        out.push_str(".fi\n");
    }
    out
}

fn escaped(line: &str) -> String {
    let text = line.replace('\\', "\\e").replace('-', "\\-");
    if text.starts_with(['.', '\'']) { format!("\\&{text}") } else { text }
}
