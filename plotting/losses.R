# The page of losses: the population over steps, its mixes below, and the same losses over bytes and hours.

look <- function() {
  theme_minimal(base_size = 11) + theme(
    panel.grid.minor = element_blank(), panel.grid.major = element_line(linewidth = 0.25, colour = "grey90"),
    axis.title = element_text(colour = "grey20"), plot.title = element_text(face = "bold", size = 14),
    plot.subtitle = element_text(colour = "grey30", size = 9.5, lineheight = 1.15), legend.position = "top",
    legend.justification = "left", legend.margin = margin(0, 12, 0, 0), legend.box.margin = margin(-4, 0, -6, 0),
    legend.title = element_text(size = 9.5), legend.text = element_text(size = 9.5),
    plot.title.position = "plot", plot.margin = margin(6, 14, 4, 8))
}

draw_losses <- function(name, ranks, metrics, mixes, law, target, colours) {
  grid.newpage()  # first: a plot that is only laid out begins a page too
  over <- along(metrics, "step")
  limits <- c(0, max(over$x) * 1.02)
  if (!is.null(law)) limits[2] <- limits[2] * 1.15
  wanted <- if (is.null(law) || is.na(target)) NA else steps_to(law, target)
  if (!is.na(wanted) && wanted < 1.7 * max(over$x)) limits[2] <- max(limits[2], wanted * 1.05)
  heights <- loss_limits(metrics, over, law, target)
  main <- loss_panel(metrics, over, "step", 1, colours) + scale_x_continuous("optimizer steps", labels = count_labels) +
    coord_cartesian(xlim = limits, ylim = heights, expand = FALSE) +
    labs(title = name, subtitle = subtitle(ranks, metrics, mixes, law, target))
  main <- main + law_layers(law, target, wanted, limits, heights)
  strip <- if (nrow(mixes)) mix_strip(mixes[mixes$won, ], ranks, limits, colours)
  upper <- if (is.null(strip)) ggplotGrob(main) else stack(main, strip, c(4, 1))
  bytes <- byte_unit(max(metrics$bytes, 0, na.rm = TRUE))
  hours <- time_unit(max(metrics$hours, 0, na.rm = TRUE))
  small <- function(axis, label, unit) {
    largest <- max(metrics[[axis]], 0, na.rm = TRUE) / unit
    loss_panel(metrics, along(metrics, axis), axis, unit, colours) + theme(legend.position = "none") +
      scale_x_continuous(label, labels = count_labels) +
      coord_cartesian(xlim = c(0, 1.02 * largest), ylim = heights, expand = FALSE)
  }
  pushViewport(viewport(layout = grid.layout(2, 2, heights = unit(c(2.5, 1), "null"))))
  place <- function(grob, row, columns) {
    pushViewport(viewport(layout.pos.row = row, layout.pos.col = columns))
    grid.draw(grob)
    popViewport()
  }
  place(upper, 1, 1:2)
  place(ggplotGrob(small("bytes", paste0("bytes seen by a rank (", bytes[[1]], ")"), bytes[[2]])), 2, 1)
  place(ggplotGrob(small("hours", paste0("training time (", hours[[1]], ")"), hours[[2]])), 2, 2)
  popViewport()
}

# From a little below the lowest to what the ranks had after a twentieth of the run: the first fall would hide the rest.
loss_limits <- function(metrics, over, law, target) {
  shown <- metrics[metrics$step >= min(over$x) + 0.05 * diff(range(over$x)), ]
  values <- c(shown$loss, shown$held_out)
  range <- range(values[is.finite(values)])
  span <- max(diff(range), 0.05)
  further <- c(if (!is.null(law)) law$asymptote, if (!is.na(target)) target)
  low <- min(range[1], further[further > range[1] - 0.5 * span])
  c(low - 0.08 * span, range[2] + 0.05 * span)
}

# Losses of all ranks along an axis whose values are divided by `unit`; lines beyond the heights are cut by the panel.
loss_panel <- function(metrics, over, axis, unit, colours) {
  ranks <- unique(metrics$rank)
  rows <- metrics[is.finite(metrics[[axis]]), ]
  rows$x <- rows[[axis]] / unit
  over$x <- over$x / unit
  held <- rows[is.finite(rows$held_out), ]
  kinds <- c(if (length(ranks) > MANY) "median", "best rank", if (nrow(drawable(held))) "held-out")
  few <- length(ranks) <= MANY
  lines <- drawable(rows[is.finite(rows$loss), ])
  panel <- ggplot() + look() + scale_y_continuous("bits per byte")
  if (few) {
    panel <- panel +
      geom_line(aes(x, loss, colour = coloured(rank, colours)), lines, linewidth = 0.35, alpha = 0.6) +
      geom_line(aes(x, held_out, colour = coloured(rank, colours), group = rank, linetype = "held-out"),
                drawable(held), linewidth = 0.5) +
      geom_point(aes(x, held_out, colour = coloured(rank, colours)), thinned(held, 40), shape = 21, fill = "white",
                 size = 1.3) +
      scale_colour_manual("rank", values = colours, drop = FALSE)
  } else {
    panel <- panel +
      geom_ribbon(aes(x, ymin = p10, ymax = p90, fill = "10 % to 90 % of the ranks"), over) +
      geom_ribbon(aes(x, ymin = p25, ymax = p75, fill = "25 % to 75 %"), over) +
      scale_fill_manual(NULL, values = c("10 % to 90 % of the ranks" = "#D6E6F2", "25 % to 75 %" = "#9CC3E0"))
    if (length(ranks) <= 64) {
      panel <- panel + geom_line(aes(x, loss, group = rank), lines, linewidth = 0.2, alpha = 0.3, colour = "#0072B2")
    }
    panel <- panel + geom_line(aes(x, p50, linetype = "median"), over, colour = "#0072B2", linewidth = 0.6)
    if (nrow(held)) panel <- panel + held_out_bars(held)
  }
  inks <- c("best rank" = "black", "median" = "#0072B2", "held-out" = if (few) "grey40" else "#D55E00")
  types <- c("best rank" = "solid", "median" = "longdash", "held-out" = "22")
  panel + geom_line(aes(x, best, linetype = "best rank"), over, linewidth = 0.6) +
    scale_linetype_manual(NULL, values = types, breaks = kinds) +
    guides(linetype = guide_legend(order = 1, override.aes = list(colour = inks[kinds])),
           fill = guide_legend(order = 2),
           colour = guide_legend(order = 3, nrow = 1, override.aes = list(linewidth = 1.2, shape = NA)))
}

# Held-out losses of many ranks: the middle 80 % and the median, at twenty places at most.
held_out_bars <- function(held) {
  held$bin <- floor(20 * held$x / max(held$x))
  bars <- do.call(rbind, lapply(split(held, held$bin), function(own) {
    data.frame(x = median(own$x), low = quantile(own$held_out, 0.1), mid = median(own$held_out),
               high = quantile(own$held_out, 0.9))
  }))
  list(geom_linerange(aes(x, ymin = low, ymax = high), bars, colour = "#D55E00", linewidth = 0.5),
       if (nrow(bars) > 1) geom_line(aes(x, mid, linetype = "held-out"), bars, colour = "#D55E00", linewidth = 0.4),
       geom_point(aes(x, mid), bars, colour = "#D55E00", fill = "white", shape = 21, size = 1.5))
}

# The rows of ranks that have two at least, between which there is a line to draw.
drawable <- function(rows) rows[ave(rows$rank, rows$rank, FUN = length) > 1, ]

# At most so many rows of each rank, evenly.
thinned <- function(rows, most) {
  do.call(rbind, c(list(rows[0, ]), lapply(split(rows, rows$rank), function(own) {
    own[unique(round(seq(1, nrow(own), length.out = min(most, nrow(own))))), ]
  })))
}

# The law from where it was fitted to the right edge, its asymptote, and the target, each with its name.
law_layers <- function(law, target, wanted, limits, heights) {
  red <- "#B00020"
  green <- "#006D4A"
  right <- function(y, label, above) {
    annotate("text", limits[2], y, label = label, hjust = 1.02, vjust = above, size = 3, colour = red)
  }
  layers <- list()
  if (!is.null(law)) {
    curve <- data.frame(step = seq(law$from, limits[2], length.out = 300))
    curve$loss <- law$at(curve$step)
    layers <- list(geom_line(aes(step, loss), curve, colour = red, linewidth = 0.6, linetype = "42"),
                   right(law$at(limits[2]), paste("fitted", law$name), -0.8))
    if (law$asymptote >= heights[1]) {
      layers <- c(layers, list(geom_hline(yintercept = law$asymptote, colour = red, linewidth = 0.3, linetype = "13"),
                               right(law$asymptote, sprintf("asymptote %.3f", law$asymptote), 1.5)))
    }
  }
  if (!is.na(target) && target >= heights[1] && target <= heights[2]) {
    layers <- c(layers, list(geom_hline(yintercept = target, colour = green, linewidth = 0.4),
                             annotate("text", limits[2] * 0.01, target, label = paste("target", format(target)),
                                      hjust = 0, vjust = 1.4, size = 3, colour = green)))
    if (!is.na(wanted) && wanted <= limits[2]) {
      layers <- c(layers, list(annotate("point", wanted, target, colour = green, size = 2)))
    }
  }
  layers
}

# Below the losses: when weights came in, coloured by the winner; a row a rank, or, of many ranks, how many in all.
mix_strip <- function(mixes, ranks, limits, colours) {
  few <- length(ranks) <= MANY
  strip <- ggplot() + look() + coord_cartesian(xlim = limits) +
    scale_x_continuous("optimizer steps of the receiver", labels = count_labels, expand = c(0, 0)) +
    theme(legend.position = if (few) "none" else "bottom", legend.margin = margin(0, 0, 0, 0))
  if (few) {
    tiles <- in_bins(mixes, "step", limits, 240)
    strip + geom_tile(aes(x, factor(receiver, rev(ranks)), width = width, fill = coloured(sender, colours)), tiles,
                      height = 0.78) +
      scale_fill_manual(values = colours) +
      scale_y_discrete("mixed into\nrank", drop = FALSE, expand = expansion(add = 0.5)) +
      theme(panel.grid.major.x = element_blank())
  } else {
    strip + geom_histogram(aes(step, fill = coloured(sender, colours)), mixes, bins = 100, boundary = 0) +
      scale_fill_manual("winner: rank", values = colours, drop = FALSE, guide = guide_legend(nrow = 1)) +
      scale_y_continuous("mixes", expand = expansion(c(0, 0.05)))
  }
}

# Two panels above each other, with one horizontal axis between them.
stack <- function(upper, lower, heights) {
  upper <- upper + theme(axis.title.x = element_blank(), axis.text.x = element_blank(),
                         plot.margin = margin(6, 14, 0, 8))
  both <- rbind(ggplotGrob(upper), ggplotGrob(lower), size = "max")
  both$heights[both$layout$t[both$layout$name == "panel"]] <- unit(heights, "null")
  both
}

subtitle <- function(ranks, metrics, mixes, law, target) {
  paste(c(
    paste0(plural(length(ranks), "rank"), ", ", plural(max(metrics$step), "step"), ", ", mixed(mixes),
           "; losses are moving averages of the training loss",
           if (any(is.finite(metrics$held_out))) "; circles are held-out losses"),
    if (!is.null(law)) {
      paste0(law$name, " fitted to the best ", law$what, ": ", law$text, "; ", promise(law, target))
    }), collapse = "\n")
}

count_labels <- function(x) format(x, big.mark = ",", scientific = FALSE, trim = TRUE, drop0trailing = TRUE)
