# The page of lineage: whose weights came to whom, when, and from whom the population descends.

draw_lineage <- function(name, ranks, mixes, alpha, colours) {
  grid.newpage()
  if (!nrow(mixes)) {
    grid.text(paste0(name, ": no mixes in gossip_logs/"), gp = gpar(fontsize = 13, col = "grey30"))
    return(invisible())
  }
  unit <- time_unit(max(mixes$hours))
  limits <- c(0, max(mixes$hours, 1e-6)) / unit[[2]]
  mixes$x <- mixes$hours / unit[[2]]
  moments <- seq(0, limits[2], length.out = 200)
  descended <- descent(ranks, mixes, alpha, moments * unit[[2]])
  winners <- mixes[mixes$won, ]
  merges <- paste0(plural(nrow(winners), "merge"), ": ")
  if (length(ranks) > MANY) {
    upper <- founders(descended$main, ranks, moments, colours)
    title <- paste0(merges, "each rank in the colour of the founder whose weights have the largest share in its own;\n",
                    "named are the founders that most of the population descends from")
  } else if (nrow(winners) <= ARROWS) {
    upper <- arrows(winners, ranks, colours)
    title <- paste0(merges, "from the winner (dot) to the loser (arrow) in the winner's colour; ",
                    "thin, both ways: both took the mean, in the fitter one's")
  } else {
    upper <- tiles(winners, ranks, limits, colours)
    title <- paste0(merges, "each mark is the rank's most frequent winner of that time")
  }
  upper <- ggplot() + look() + labs(title = paste0(name, ": whose weights went to whom"), subtitle = title) + upper
  lower <- shares_panel(descended$means, ranks, moments, colours) +
    labs(x = paste0("time since the first event (", unit[[1]], ")"))
  in_time <- function(panel) {
    panel + scale_x_continuous(labels = count_labels, expand = expansion(c(0.005, 0.01)), limits = limits,
                               oob = function(x, ...) x)  # half a cell hangs over
  }
  grid.draw(stack(in_time(upper), in_time(lower), c(2.4, 1)))
}

# Of many ranks: each one's main founder over time, ranks of one founder beside each other.
founders <- function(main, ranks, moments, colours) {
  last <- main[nrow(main), ]
  placed <- order(coloured(ranks[last], colours), last)
  cells <- expand.grid(x = moments, place = seq_along(ranks))
  cells$founder <- coloured(ranks[as.vector(main[, placed])], colours)
  list(
    geom_raster(aes(x, place, fill = founder), cells),
    scale_fill_manual("founder: rank", values = colours, drop = FALSE, guide = guide_legend(nrow = 1)),
    scale_y_continuous(paste(length(ranks), "ranks, by their founder at the end"), expand = c(0, 0)),
    theme(axis.text.y = element_blank(), panel.grid = element_blank()))
}

arrows <- function(mixes, ranks, colours) {
  lane <- function(rank) match(rank, ranks)
  mixes <- mixes[!is.na(lane(mixes$sender)) & !is.na(lane(mixes$receiver)), ]
  mixes$from <- lane(mixes$sender)
  mixes$to <- lane(mixes$receiver)
  list(
    geom_hline(yintercept = seq_along(ranks), colour = "grey80", linewidth = 0.5),
    segments(mixes[mixes$mean, ], 0.06, 0.25, "both", colours),
    segments(mixes[!mixes$mean, ], 0, 0.6, "last", colours),
    geom_point(aes(x, from, colour = coloured(sender, colours)), mixes[!mixes$mean, ], size = 1.7),
    scale_colour_manual("winner: rank", values = colours, drop = FALSE, guide = guide_legend(nrow = 1)),
    scale_y_reverse("rank", breaks = seq_along(ranks), labels = ranks, minor_breaks = NULL,
                    expand = expansion(add = 0.4)),
    theme(panel.grid.major.y = element_blank()))
}

segments <- function(mixes, gap, linewidth, ends, colours) {
  length <- unit(if (ends == "both") 1.2 else 1.9, "mm")
  geom_segment(aes(x, from + gap * sign(to - from), xend = x, yend = to - 0.06 * sign(to - from),
                   colour = coloured(sender, colours)), mixes, linewidth = linewidth,
               arrow = arrow(length = length, type = "closed", angle = 22, ends = ends))
}

tiles <- function(mixes, ranks, limits, colours) {
  binned <- in_bins(mixes, "x", limits, 240)
  list(
    geom_tile(aes(x, factor(receiver, rev(ranks)), width = width, fill = coloured(sender, colours)), binned,
              height = 0.8),
    scale_fill_manual("winner: rank", values = colours, drop = FALSE, guide = guide_legend(nrow = 1)),
    scale_y_discrete("rank", drop = FALSE),
    theme(panel.grid.major.x = element_blank()))
}

# The population's descent over time, by founder.
shares_panel <- function(means, ranks, moments, colours) {
  grouped <- rowsum(t(means), as.integer(coloured(ranks, colours)))
  table <- data.frame(x = rep(moments, each = nrow(grouped)), share = as.vector(grouped),
                      name = factor(names(colours)[as.integer(rownames(grouped))], names(colours)))
  ggplot() + look() + theme(legend.position = "none") +
    geom_area(aes(x, share, fill = name), table, stat = "identity", colour = "white", linewidth = 0.15) +
    scale_fill_manual(values = colours) + coord_cartesian(ylim = c(0, 1)) +
    scale_y_continuous("share of the\npopulation's descent", expand = c(0, 0),
                       labels = function(y) paste(100 * y, "%"))
}
