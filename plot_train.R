#!/usr/bin/env Rscript
# Plots a run, finished or alive, from its files: the losses with a law fitted to them, and whose weights went to whom.
#
#     Rscript plot_train.R                              the newest run in a folder here, or under runs/
#     Rscript plot_train.R RUN_DIR|FILE.tsv [target]    that run, or that rank's metrics; target: loss in bits per byte
#
# Writes plot_train.pdf (two pages), plot_train_loss.png and plot_train_lineage.png into the run directory, for FILE.tsv
# beside it and under its name. gossip_logs/ is looked for where the run was started, beside the run and above that.

MANY <- 8            # ranks; above it they are shown as a distribution
NAMED <- 7           # senders that have a colour of their own where there are many
ROWS_IN_ALL <- 2e5   # of metrics that are kept, evenly thinned
ARROWS <- 250        # on the page of lineage; above it time is cut into bins
PALETTE <- c("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#5B4B9A")
OTHERS <- "#B8B8B8"

main <- function(arguments) {
  if (any(arguments %in% c("-h", "--help"))) return(cat(usage()))
  check_packages(c("ggplot2", "minpack.lm"))
  target <- parse_target(arguments)
  place <- find_place(arguments)
  metrics <- read_metrics(place$files)
  mixes <- read_mixes(place$logs)
  suppressPackageStartupMessages({library(ggplot2); library(grid)})
  ranks <- sort(unique(metrics$rank))
  over <- along(metrics, "step")
  laws <- fit_laws(metrics, over)
  report(place$name, ranks, metrics, mixes, over, laws, target)
  if (is.null(place$logs)) cat("no mixes known: there is no ", paste(place$sought, collapse = " nor "), "\n", sep = "")
  colours <- rank_colours(ranks, mixes, place$alpha)
  law <- if (length(laws)) laws[[1]]
  draw(place$out, list(
    loss = function() draw_losses(place$name, ranks, metrics, mixes, law, target, colours),
    lineage = function() draw_lineage(place$name, ranks, mixes, place$alpha, colours)))
}

# Each page as PNG, all pages as one PDF; by cairo, which needs no X server.
draw <- function(out, pages) {
  for (page in names(pages)) {
    path <- paste0(out, "_", page, ".png")
    png(path, width = 1800, height = 1200, res = 150, type = "cairo")
    pages[[page]]()
    dev.off()
    cat(path, "\n", sep = "")
  }
  path <- paste0(out, ".pdf")
  cairo_pdf(path, width = 12, height = 8, onefile = TRUE)
  for (page in pages) page()
  dev.off()
  cat(path, "\n", sep = "")
}

# The first lines of this file, as they stand.
usage <- function() {
  lines <- readLines(script)[-1]
  paste0(sub("^# ?", "", lines[seq_len(match(FALSE, startsWith(lines, "#")) - 1)]), "\n", collapse = "")
}

fail <- function(...) {
  message("error: ", ...)
  quit(status = 2)
}

check_packages <- function(names) {
  missing <- names[vapply(names, function(name) !length(find.package(name, quiet = TRUE)), TRUE)]
  if (length(missing)) {
    fail("expected the R packages ", paste(names, collapse = " and "), ", got no ",
         paste(missing, collapse = " and no "), ": on Debian install r-cran-ggplot2 and r-cran-minpack.lm")
  }
}

parse_target <- function(arguments) {
  if (length(arguments) > 2) fail("expected RUN_DIR|FILE.tsv and a target loss, got ", length(arguments), " arguments: see --help")
  if (length(arguments) < 2) return(NA)
  target <- suppressWarnings(as.numeric(arguments[2]))
  if (!isTRUE(target > 0)) fail("expected a target loss above 0 in bits per byte, got ", arguments[2], ": choose one")
  target
}

# What to plot: the name, the metrics' files, the gossip logs and where they were looked for, and where the pictures go.
find_place <- function(arguments) {
  if (!length(arguments)) {
    found <- Sys.glob(c("runs/*/metrics/rank_*.tsv", "*/metrics/rank_*.tsv"))
    if (!length(found)) fail("expected a run under runs/, got none in ", getwd(), ": name its RUN_DIR")
    newest <- found[which.max(file.mtime(found))]
    path <- dirname(dirname(newest))
  } else path <- sub("/+$", "", arguments[1])
  if (!file.exists(path)) fail("expected a run directory or a metrics file, got ", path, ", which does not exist: check the path")
  whole <- dir.exists(path)
  files <- if (whole) rank_tables(file.path(path, "metrics")) else path
  if (!length(files)) fail("expected a run directory, got ", path, ", without metrics/rank_*.tsv: check the path")
  run <- normalizePath(if (whole) path else dirname(dirname(path)))
  out <- if (whole) file.path(path, "plot_train") else sub("[.]tsv$", "", path)
  if (file.access(dirname(out), 2) != 0) fail("expected to write pictures to ", dirname(out), ", got no right to: copy the run elsewhere")
  config <- read_config(file.path(run, "config.json"))
  started <- config("working_directory")
  logs <- unique(file.path(c(if (nzchar(started)) started, dirname(run), dirname(dirname(run))), "gossip_logs"))
  has <- vapply(logs, function(log) length(rank_tables(log, paste0(basename(run), "_"))) > 0, TRUE)
  list(name = if (whole) basename(run) else paste0(basename(run), ", ", basename(path)), files = files, out = out,
       sought = file.path(logs, paste0(basename(run), "_rank_0000.tsv")),
       logs = if (any(has)) file.path(logs[has][1], sub("^", paste0(basename(run), "_"), basename(files))),
       alpha = merge_share(config))
}

# The paths of prefix + rank_0000.tsv ... in a folder: no glob, whose signs the names of runs may have in them.
rank_tables <- function(folder, prefix = "") {
  names <- list.files(folder)
  rest <- substring(names, nchar(prefix) + 1)
  names <- names[startsWith(names, prefix) & grepl("^rank_[0-9]{4,}[.]tsv$", rest)]
  if (length(names)) file.path(folder, names) else character()
}

# A function from an option's name to its text in config.json; "" where it is not there, as in a run that just began.
read_config <- function(path) {
  text <- if (file.exists(path)) paste(readLines(path, warn = FALSE), collapse = " ") else ""
  function(name) {
    before <- sprintf('"%s": *', name)
    found <- regexpr(paste0(before, '("([^"\\\\]|\\\\.)*"|[^",}]*)'), text, perl = TRUE)
    if (found < 0) return("")
    value <- gsub('^"|"$', "", sub(before, "", regmatches(text, found)))
    gsub("\\\\(.)", "\\1", value)  # \" and \\: no path needs other escapes
  }
}

# The sender's share in a merge: all in a clone, half in an average.
merge_share <- function(config) {
  share <- suppressWarnings(as.numeric(config("gossip_recombination_alpha")))
  method <- config("gossip_merge_method")
  if (method == "clonal") 1 else if (method == "average" || is.na(share)) 0.5 else share
}

script <- sub("^--file=", "", grep("^--file=", commandArgs(FALSE), value = TRUE)[1])
for (part in c("reading", "summary", "laws", "losses", "lineage")) {
  source(file.path(dirname(script), "plotting", paste0(part, ".R")))
}
main(commandArgs(TRUE))
