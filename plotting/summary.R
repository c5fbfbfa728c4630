# What the pages show of many rows: the population along an axis, its mixes in bins, and whom its weights descend from.

# The population's losses on an even grid along "step", "hours" or "bytes": the lowest, and quantiles.
along <- function(metrics, axis) {
  known <- metrics[is.finite(metrics$loss) & is.finite(metrics[[axis]]), ]
  grid <- seq(min(known[[axis]]), max(known[[axis]]), length.out = max(2, min(400, length(unique(known[[axis]])))))
  of_rank <- function(own) {
    if (length(unique(own[[axis]])) < 2) return(rep(NA_real_, length(grid)))
    approx(own[[axis]], own$loss, grid, ties = mean)$y
  }
  losses <- do.call(cbind, lapply(split(known, known$rank), of_rank))
  ranks <- rowSums(is.finite(losses))
  enough <- ranks > 0 & ranks >= median(ranks) / 2  # where the first or the last ranks are alone they are no population
  if (!any(enough)) fail("expected two rows of some rank to draw a line, got fewer: wait a little")
  losses <- losses[enough, , drop = FALSE]
  spread <- apply(losses, 1, quantile, c(0, 0.1, 0.25, 0.5, 0.75, 0.9), na.rm = TRUE, names = FALSE)
  data.frame(x = grid[enough], best = spread[1, ], p10 = spread[2, ], p25 = spread[3, ], p50 = spread[4, ],
             p75 = spread[5, ], p90 = spread[6, ])
}

# Mixes along "step" or "hours", in bins: for each receiver and bin the sender it took weights from most often.
in_bins <- function(mixes, axis, limits, bins) {
  width <- diff(limits) / bins
  bin <- pmin(floor((mixes[[axis]] - limits[1]) / width), bins - 1)
  counted <- aggregate(list(mixes = rep(1, nrow(mixes))),
                       list(bin = bin, receiver = mixes$receiver, sender = mixes$sender), sum)
  counted <- counted[order(-counted$mixes), ]
  counted <- counted[!duplicated(counted[c("bin", "receiver")]), ]
  counted$x <- limits[1] + (counted$bin + 0.5) * width
  counted$width <- width
  counted
}

# Whom the weights descend from after each of `moments` (hours), where a merge moves the share `alpha` of them or all, a
# mean half of them at both ends at once, and what a rank learns by itself moves none. means: the population's mean share of
# each founder (moments x ranks); main: the founder with the largest share in each rank (moments x ranks, as positions
# in `ranks`).
descent <- function(ranks, mixes, alpha, moments) {
  shares <- diag(length(ranks))  # of founders (rows) in ranks (columns)
  receiver <- match(mixes$receiver, ranks)
  sender <- match(mixes$sender, ranks)
  known <- which(!is.na(receiver) & !is.na(sender))
  means <- main <- matrix(0, length(moments), length(ranks))
  place <- paste(mixes$exchange, mixes$receiver)
  twin <- ifelse(mixes$mean, match(paste(mixes$exchange, mixes$sender), place), NA)  # the row of a mean's other end
  next_one <- 1
  for (moment in seq_along(moments)) {
    while (next_one <= length(known) && mixes$hours[known[next_one]] <= moments[moment]) {
      row <- known[next_one]
      to <- receiver[row]
      from <- sender[row]
      share <- if (mixes$mean[row]) 0.5 else if (mixes$whole[row]) 1 else alpha
      after <- (1 - share) * shares[, to] + share * shares[, from]
      if (is.na(twin[row])) shares[, to] <- after else if (row < twin[row]) shares[, c(to, from)] <- after
      next_one <- next_one + 1
    }
    means[moment, ] <- rowMeans(shares)
    main[moment, ] <- max.col(t(shares), ties.method = "first")
  }
  list(means = means, main = main)
}

# A colour for each rank, or, of many, for those that the population descends from most, and one for the others.
rank_colours <- function(ranks, mixes, alpha) {
  if (length(ranks) <= MANY) return(setNames(PALETTE[seq_along(ranks)], ranks))
  final <- descent(ranks, mixes, alpha, Inf)$means[1, ]
  chosen <- ranks[sort(order(-final)[seq_len(NAMED)])]
  c(setNames(PALETTE[seq_len(NAMED)], chosen), others = OTHERS)
}

# Ranks as a factor of the names that have a colour.
coloured <- function(ranks, colours) {
  name <- as.character(ranks)
  name[!name %in% names(colours)] <- "others"
  factor(name, names(colours))
}

count <- function(number) format(round(number), big.mark = ",", scientific = FALSE, trim = TRUE)

plural <- function(number, noun) paste0(count(number), " ", noun, if (number != 1) "s")

# How many exchanges moved weights.
mixed <- function(mixes) {
  number <- sum(mixes$won)
  paste(count(number), if (number == 1) "mix" else "mixes")
}

# The unit, and what to divide by, that make `largest` readable: of hours, and of bytes.
time_unit <- function(largest) {
  if (largest < 0.05) list("seconds", 1 / 3600) else if (largest < 2) list("minutes", 1 / 60)
  else if (largest < 72) list("hours", 1) else list("days", 24)
}
byte_unit <- function(largest) {
  power <- max(0, min(4, floor(log10(max(largest, 1)) / 3)))
  list(c("bytes", "kB", "MB", "GB", "TB")[power + 1], 1000^power)
}
