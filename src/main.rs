use std::ffi::OsString;

use walden::cli;

fn main() {
    let args: Vec<OsString> = std::env::args_os().collect();
    // Before anything else may choose an exit status: PostgreSQL takes 1 to 125 from wal-fetch as the end of the WAL.
    let code = if cli::wal_fetch::is_meant(&args) {
        cli::wal_fetch::run(&args, cli::deliver::deliver)
    } else {
        cli::run(&args)
    };
    std::process::exit(i32::from(code))
}
