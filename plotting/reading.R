# A run's files as data frames: torn lines, NA, further columns and steps that were taken again do no harm.

# The whole rows of a tab-separated file as text, columns by name; without what was cut off within a line, or is zeros,
# as a lost write leaves them. most: rows, evenly chosen; like: of rows but the first, what they match.
read_rows <- function(path, wanted, most = Inf, like = NULL) {
  bytes <- file.size(path)
  if (is.na(bytes) || bytes == 0) return(NULL)
  raw <- readBin(path, "raw", bytes)
  text <- gsub("\r", "", rawToChar(raw[raw != 0]), fixed = TRUE, useBytes = TRUE)
  lines <- strsplit(text, "\n", fixed = TRUE, useBytes = TRUE)[[1]]
  if (!endsWith(text, "\n")) lines <- lines[-length(lines)]
  if (length(lines) < 1) return(NULL)
  header <- strsplit(lines[1], "\t", fixed = TRUE)[[1]]
  absent <- setdiff(wanted, header)
  if (length(absent)) fail("expected the column ", absent[1], " in ", path, ", got another kind of file: check the path")
  lines <- lines[-1]
  if (!is.null(like)) lines <- lines[seq_along(lines) == 1 | grepl(like, lines, perl = TRUE, useBytes = TRUE)]
  if (length(lines) > most) {
    measured <- if ("val_loss" %in% header) {
      !grepl(sprintf("^([^\t]*\t){%d}NA(\t|$)", match("val_loss", header) - 1), lines, perl = TRUE)
    } else FALSE
    evenly <- seq_along(lines) %in% unique(round(seq(1, length(lines), length.out = most)))
    lines <- lines[evenly | measured]
  }
  fields <- strsplit(paste0(lines, "\t."), "\t", fixed = TRUE)  # the last one may be empty, which strsplit would drop
  fields <- fields[lengths(fields) == length(header) + 1]
  if (!length(fields)) return(NULL)
  table <- matrix(unlist(fields, use.names = FALSE), ncol = length(header) + 1, byrow = TRUE)
  as.data.frame(`colnames<-`(table[, match(wanted, header), drop = FALSE], wanted))
}

read_metrics <- function(files) {
  wanted <- c("rank", "step", "time_s", "ema_loss", "val_loss", "bytes_seen")
  one <- function(path) {
    rows <- read_rows(path, wanted, max(100, ROWS_IN_ALL / length(files)))
    if (is.null(rows)) return(NULL)
    rows[] <- lapply(rows, function(column) suppressWarnings(as.numeric(column)))
    rows <- rows[is.finite(rows$rank) & is.finite(rows$step), ]
    later <- c(rev(cummin(rev(rows$step)))[-1], Inf)  # a resumed run goes back: what it writes again counts
    rows[rows$step < later, ]
  }
  metrics <- do.call(rbind, lapply(files, one))
  if (!any(is.finite(metrics$ema_loss))) {
    fail("expected rows with a loss, got none yet in ", dirname(files[1]), ": wait a little, or train for more than --log_every steps")
  }
  data.frame(rank = metrics$rank, step = metrics$step, hours = metrics$time_s / 3600, bytes = metrics$bytes_seen,
             loss = metrics$ema_loss / log(2), held_out = metrics$val_loss / log(2))
}

# One row a merge: hours since the first event, the receiver and its step, the sender, the exchange it was part of; won:
# the sender was fitter; mean: both took the mean; whole: the receiver took the weights as they were.
read_mixes <- function(logs) {
  wanted <- c("timestamp", "rank", "event", "step", "fitness", "exchange_id", "peer", "message")
  one <- function(path) {
    rows <- read_rows(path, wanted, like = "\t(merged|averaged|sent)\t")
    if (is.null(rows)) return(NULL)
    step <- suppressWarnings(as.numeric(rows$step))
    step[!rows$event %in% c("merged", "averaged")] <- NA
    known <- which(is.finite(step))
    later <- c(rev(cummin(rev(step[known])))[-1], Inf)  # a restarted rank goes back: what it takes again counts
    undone <- known[step[known] > later]
    if (length(undone)) rows[-undone, ] else rows
  }
  events <- do.call(rbind, lapply(Filter(file.exists, logs), one))
  nobody <- data.frame(hours = numeric(), step = numeric(), receiver = numeric(), sender = numeric(),
                       exchange = character(), won = logical(), mean = logical(), whole = logical())
  if (is.null(events)) return(nobody)
  time <- as.numeric(as.POSIXct(events$timestamp, format = "%Y-%m-%dT%H:%M:%OSZ", tz = "UTC")) / 3600
  number <- function(column) suppressWarnings(as.numeric(column))
  events <- data.frame(hours = time - min(time, na.rm = TRUE), step = number(events$step),
                       receiver = number(events$rank), sender = number(events$peer), event = events$event,
                       fitness = number(events$fitness), exchange = events$exchange_id,
                       whole = startsWith(events$message, "adopts:"))
  merged <- events[events$event %in% c("merged", "averaged"), ]
  # A sender's word counts only where the receiver's log is not at hand.
  sent <- events[events$event == "sent" & !events$sender %in% events$receiver, ]
  sent[c("receiver", "sender")] <- sent[c("sender", "receiver")]
  mixes <- rbind(merged, sent)
  mixes <- mixes[complete.cases(mixes[c("hours", "step", "receiver", "sender")]), ]
  # Both ends of an average receive; the fitter one is the winner.
  both <- mixes$mean <- mixes$event == "averaged"
  ends <- mixes[both, ]
  other <- ends$fitness[match(paste(ends$exchange, ends$sender), paste(ends$exchange, ends$receiver))]
  mixes$won <- TRUE
  mixes$won[both] <- is.na(other) | mixes$fitness[both] > other
  mixes <- mixes[order(mixes$hours), names(nobody)]
  if (nrow(mixes)) mixes else nobody
}
